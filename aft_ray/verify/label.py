"""Labels the candidates of groups: the answer each gives, the verdict on it, and its binary reward.

Invariant: a failure of the verifier is undecided, never wrong, and says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from aft_ray.storage.records import Candidate, Group, Verdict
from aft_ray.verify.process_pool import Item, Verifier

if TYPE_CHECKING:
    from aft_ray.tasks.base import Task


def label_groups(groups: Sequence[Group], tasks: Mapping[str, Task], verifier: Verifier) -> list[Group]:
    """`groups` with every candidate's answer, verdict, reason and reward: 1.0 for a right answer, else 0.0.

    tasks: by the names in `question.task`. All candidates are verified in one call, the cheapest way.
    """
    items = [
        Item(tasks[group.question.task], candidate.text, group.question.gold)
        for group in groups
        for candidate in group.candidates
    ]
    outcomes = iter(verifier.verify(items))

    def labelled(candidate: Candidate) -> Candidate:
        outcome = next(outcomes)
        return replace(
            candidate,
            answer=outcome.answer,
            verdict=outcome.verdict,
            reason=outcome.reason,
            reward=1.0 if outcome.verdict is Verdict.RIGHT else 0.0,
        )

    return [replace(group, candidates=[labelled(candidate) for candidate in group.candidates]) for group in groups]
