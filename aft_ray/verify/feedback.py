"""Turns verdicts into rewards: right or wrong, the share of right steps, or a judge's rating.

Invariants: an undecided candidate stays undecided and is not sent to a judge. Equal responses to a question get equal
rewards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from aft_ray.config.run import FeedbackConfig
from aft_ray.storage.records import Candidate, Group, Question, Verdict

if TYPE_CHECKING:
    from aft_ray.verify.judge.judge import Rating, RatingRequest


@runtime_checkable
class StepGrader(Protocol):
    """A task that can grade the steps of a response, which `feedback.kind=steps` needs."""

    def grade_steps(self, question: Question, response: str, right: bool) -> float:
        """The reward of a response, 0 to 1. `right`: whether the verifier found the final answer right.

        Raises ValueError when the steps of this question cannot be graded.
        """


class JudgeClient(Protocol):
    """Rates candidates: a `Judge`, or a handle of one in another process."""

    def rate(self, requests: Sequence[RatingRequest]) -> list[Rating]:
        """One rating for each request, in order. Raises JudgeFailed."""


def reward_groups(
    groups: Sequence[Group], tasks: Mapping[str, object], feedback: FeedbackConfig, judge: JudgeClient | None
) -> list[Group]:
    """Labelled groups with the rewards of `feedback.kind`.

    binary: the groups are returned unchanged. steps: the grade of the question's task, 0 to 1. judge: the mean rating,
    1 to 10; a candidate without a rating becomes undecided.

    Args:
        tasks: The tasks of the run by the names in `Question.task`. Kind steps needs a `StepGrader`.
        judge: Needed for kind judge only.

    Raises:
        JudgeFailed: The judge cannot be used.
        ValueError: The steps of a question cannot be graded, or kind judge has no judge.
    """
    if feedback.kind == "steps":
        return [_reward_steps(group, tasks[group.question.task]) for group in groups]
    if feedback.kind == "judge":
        if judge is None:
            raise ValueError("feedback.kind=judge needs a judge")
        return _reward_ratings(groups, judge)
    return list(groups)


def _reward_steps(group: Group, task: object) -> Group:
    if not isinstance(task, StepGrader):
        raise ValueError(f"feedback.kind=steps cannot grade {group.question.task}, whose task has no `grade_steps`")

    def rewarded(candidate: Candidate) -> Candidate:
        if candidate.verdict is Verdict.UNDECIDED:
            return candidate
        right = candidate.verdict is Verdict.RIGHT
        return replace(candidate, reward=task.grade_steps(group.question, candidate.text, right))

    return replace(group, candidates=[rewarded(candidate) for candidate in group.candidates])


def _reward_ratings(groups: Sequence[Group], judge: JudgeClient) -> list[Group]:
    from aft_ray.verify.judge.judge import RatingRequest  # Imports the client library, which other kinds do not need.

    requests = [
        RatingRequest(f"{group.question.id}, candidate {index}", group.question.text, group.question.reference, c.text)
        for group in groups
        for index, c in enumerate(group.candidates)
        if c.verdict is not Verdict.UNDECIDED
    ]
    # The judge asks only once about equal candidates.
    rewards = iter([rating.reward for rating in judge.rate(requests)])

    def rewarded(candidate: Candidate) -> Candidate:
        if candidate.verdict is Verdict.UNDECIDED:
            return candidate
        if (reward := next(rewards)) is not None:
            return replace(candidate, reward=reward)
        return replace(candidate, verdict=Verdict.UNDECIDED, reward=0.0, reason="the judge gave no rating")

    return [replace(group, candidates=[rewarded(candidate) for candidate in group.candidates]) for group in groups]
