"""What comes out of verifying one response.

Invariant: an undecided outcome says why.
"""

from __future__ import annotations

from dataclasses import dataclass

from aft_ray.storage.records import Verdict


@dataclass(frozen=True, slots=True)
class VerificationResult:
    """answer: what was read out of the response. reason: why the verdict is undecided; empty otherwise."""

    verdict: Verdict
    answer: str | None
    reason: str = ""


def decided(equal: bool, answer: str | None) -> VerificationResult:
    return VerificationResult(Verdict.RIGHT if equal else Verdict.WRONG, answer)


def undecided(reason: str, answer: str | None = None) -> VerificationResult:
    return VerificationResult(Verdict.UNDECIDED, answer, reason)
