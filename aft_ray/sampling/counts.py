"""What is counted over the sampled groups of a round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aft_ray.storage.records import Group, Verdict


@dataclass(frozen=True, slots=True)
class SampleCounts:
    """Counts over labelled groups; counts of different groups can be added.

    Args:
        with_signal: groups in which two candidates differ in reward.
        truncated: candidates that were cut off at `sampling.max_tokens`.
        right_score, wrong_score: sums of the scores of right and of wrong candidates, nats per token.
    """

    groups: int = 0
    with_signal: int = 0
    right: int = 0
    wrong: int = 0
    undecided: int = 0
    truncated: int = 0
    tokens: int = 0
    right_score: float = 0.0
    wrong_score: float = 0.0

    def __add__(self, other: SampleCounts) -> SampleCounts:
        return SampleCounts(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    @property
    def candidates(self) -> int:
        return self.right + self.wrong + self.undecided

    @property
    def pass_rate(self) -> float:
        """Share of right candidates among those that the verifier decided."""
        return self.right / max(1, self.right + self.wrong)


def count_groups(groups: Sequence[Group]) -> SampleCounts:
    """Counts over labelled groups."""
    candidates = [candidate for group in groups for candidate in group.candidates]
    right = [candidate for candidate in candidates if candidate.verdict is Verdict.RIGHT]
    wrong = [candidate for candidate in candidates if candidate.verdict is Verdict.WRONG]
    return SampleCounts(
        groups=len(groups),
        with_signal=sum(group.has_signal for group in groups),
        right=len(right),
        wrong=len(wrong),
        undecided=len(candidates) - len(right) - len(wrong),
        truncated=sum(candidate.finish_reason == "length" for candidate in candidates),
        tokens=sum(len(candidate.token_ids) for candidate in candidates),
        right_score=sum(candidate.score for candidate in right),
        wrong_score=sum(candidate.score for candidate in wrong),
    )
