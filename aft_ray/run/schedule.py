"""In what order a run samples its rounds, and with which policy version at the least. Pure: nothing happens here.

Invariant: a round is sampled by a version at most `max_staleness` behind the one it trains, version n - 1 for round n.
The conductor follows this order with real samplers, `planning/simulation.py` with simulated ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SampleRound:
    """Sample a round with the newest version there is, once there is `version`; then it is ready for training."""

    round: int
    version: int


@dataclass(frozen=True, slots=True)
class AwaitVersion:
    """Bring the samplers to a version, to measure it: nothing is left to sample."""

    version: int


def order_of_rounds(first: int, last: int, max_staleness: int) -> Iterator[SampleRound | AwaitVersion]:
    """What the conductor does, one after the other, from round `first` to the version of round `last`."""
    for number in range(first, last + 1):
        yield SampleRound(number, max(0, number - 1 - max_staleness))
    # What is still in training is measured as it comes; the last wait ends the run.
    for version in range(max(0, last - max_staleness), last + 1):
        yield AwaitVersion(version)
