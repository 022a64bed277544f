"""Turns verdicts into rewards: right or wrong, the share of right steps, or a judge's rating.

Invariants: an undecided candidate stays undecided and costs nothing. Equal responses to a question get equal rewards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from aft_ray.config.run import FeedbackConfig
from aft_ray.storage.records import Candidate, Group, Verdict
from aft_ray.tasks.arithmetic_steps import grade_steps

if TYPE_CHECKING:
    from aft_ray.verify.judge.judge import JudgeItem, Rating


class Rater(Protocol):
    """A `Judge`, or whatever asks one."""

    def rate(self, items: Sequence[JudgeItem]) -> list[Rating]: ...


def reward_groups(groups: Sequence[Group], feedback: FeedbackConfig, judge: Rater | None) -> list[Group]:
    """Labelled groups with the rewards of `feedback.kind`; `judge` is needed for that kind only.

    binary: as they are. steps: `grade_steps`, 0 to 1. judge: the mean rating, 1 to 10; a candidate that got none is
    undecided. Raises JudgeFailed, and ValueError when steps are to be graded of another task than arithmetic.
    """
    if feedback.kind == "steps":
        return [_graded(group) for group in groups]
    if feedback.kind == "judge":
        if judge is None:
            raise ValueError("feedback.kind=judge needs a judge")
        return _judged(groups, judge)
    return list(groups)


def _graded(group: Group) -> Group:
    def grade(candidate: Candidate) -> Candidate:
        if candidate.verdict is Verdict.UNDECIDED:
            return candidate
        right = candidate.verdict is Verdict.RIGHT
        return replace(candidate, reward=grade_steps(group.question.text, candidate.text, right))

    return replace(group, candidates=[grade(candidate) for candidate in group.candidates])


def _judged(groups: Sequence[Group], judge: Rater) -> list[Group]:
    from aft_ray.verify.judge.judge import JudgeItem  # imports the client library, which other kinds do without

    items = [
        JudgeItem(f"{group.question.id}, candidate {index}", group.question.text, group.question.reference, c.text)
        for group in groups
        for index, c in enumerate(group.candidates)
        if c.verdict is not Verdict.UNDECIDED
    ]
    # The judge asks about equal items once.
    rewards = iter([rating.reward for rating in judge.rate(items)])

    def rewarded(candidate: Candidate) -> Candidate:
        if candidate.verdict is Verdict.UNDECIDED:
            return candidate
        if (reward := next(rewards)) is not None:
            return replace(candidate, reward=reward)
        return replace(candidate, verdict=Verdict.UNDECIDED, reward=0.0, reason="the judge gave no rating")

    return [replace(group, candidates=[rewarded(candidate) for candidate in group.candidates]) for group in groups]
