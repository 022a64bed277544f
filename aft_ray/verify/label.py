"""Labels a candidate: the answer it gives, the verdict on it and its binary reward.

Invariant: a failure of the verifier is undecided, never wrong.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from aft_ray.records import Candidate, Verdict

if TYPE_CHECKING:
    from aft_ray.tasks.base import Task


def label(task: Task, candidate: Candidate, gold: str) -> Candidate:
    """`candidate` with answer, verdict and reward filled in: 1.0 for a right answer, else 0.0."""
    answer: str | None = None
    try:
        answer = task.extract(candidate.text)
        verdict = Verdict(task.same(answer, gold))
    except Exception:
        verdict = Verdict.UNDECIDED
    return replace(candidate, answer=answer, verdict=verdict, reward=1.0 if verdict is Verdict.RIGHT else 0.0)
