"""The order in which a run samples its rounds, and the oldest policy version that may sample each round.

Invariant: round n trains version n - 1 into version n, and is sampled by a version that is at most `max_staleness`
older than version n - 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SampleRound:
    """Sample a round with the newest version, as soon as there is `version` or a newer one."""

    round: int
    version: int


@dataclass(frozen=True, slots=True)
class AwaitVersion:
    """Load a version into the samplers so that it can be evaluated; no round is left to sample."""

    version: int


def order_of_rounds(first: int, last: int, max_staleness: int) -> Iterator[SampleRound | AwaitVersion]:
    """The steps of the orchestrator, from round `first` to the version that round `last` publishes."""
    for number in range(first, last + 1):
        yield SampleRound(number, max(0, number - 1 - max_staleness))
    # Versions that are still in training are evaluated when they are published. The last wait ends the run.
    for version in range(max(0, last - max_staleness), last + 1):
        yield AwaitVersion(version)
