"""Labels the candidates of groups with the answer of each, the verdict on it, and its binary reward.

Invariants: a failure of the verifier makes a candidate undecided, with a reason, and never wrong; a candidate that is
labelled already is not verified again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from aft_ray.storage.records import Candidate, Group, Verdict
from aft_ray.verify.process_pool import AnswerReader, VerificationRequest, Verifier


def label_groups(groups: Sequence[Group], tasks: Mapping[str, AnswerReader], verifier: Verifier) -> list[Group]:
    """`groups` with the answer, verdict, reason and reward of every candidate.

    The reward is 1.0 for a right answer and 0.0 otherwise. All candidates are verified in one call, because large
    calls cost the verifier least. Those that have been labelled before stay as they are.

    Args:
        tasks: The tasks of the run by the names in `Question.task`.

    Raises:
        KeyError: The task of a group is not in `tasks`.
    """
    requests = [
        VerificationRequest(tasks[group.question.task], candidate.text, group.question.gold)
        for group in groups
        for candidate in group.candidates
        if not is_labelled(candidate)
    ]
    results = iter(verifier.verify(requests))

    def labelled(candidate: Candidate) -> Candidate:
        if is_labelled(candidate):
            return candidate
        result = next(results)
        return replace(
            candidate,
            answer=result.answer,
            verdict=result.verdict,
            reason=result.reason,
            reward=1.0 if result.verdict is Verdict.RIGHT else 0.0,
        )

    return [replace(group, candidates=[labelled(candidate) for candidate in group.candidates]) for group in groups]


def is_labelled(candidate: Candidate) -> bool:
    """Whether a candidate has a verdict. An undecided one that was verified has a reason."""
    return candidate.verdict is not Verdict.UNDECIDED or bool(candidate.reason)
