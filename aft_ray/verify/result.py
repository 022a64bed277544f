"""The result of verifying one response.

Invariant: an undecided result has a reason.
"""

from __future__ import annotations

from dataclasses import dataclass

from aft_ray.storage.records import Verdict


@dataclass(frozen=True, slots=True)
class VerificationResult:
    """The verdict on one response.

    Attributes:
        answer: The answer that was extracted from the response; None when there was none.
        reason: Why the verdict is undecided; empty for the other verdicts.
    """

    verdict: Verdict
    answer: str | None
    reason: str = ""


def decided(right: bool, answer: str | None) -> VerificationResult:
    """The result for an answer that was understood."""
    return VerificationResult(Verdict.RIGHT if right else Verdict.WRONG, answer)


def undecided(reason: str, answer: str | None = None) -> VerificationResult:
    """The result for a response on which no verdict is possible."""
    return VerificationResult(Verdict.UNDECIDED, answer, reason)
