"""The process group of a weight broadcast: the trainer and the engines that the driver chose for one version.

Invariant: rank 0 is train worker 0; an engine's processes have consecutive ranks, in vLLM's own order.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class Receiver:
    """An engine that receives a broadcast, and the number of its processes."""

    name: str
    processes: int


@dataclass(frozen=True, slots=True)
class BroadcastGroup:
    """Which engines receive the broadcast of a version. Without receivers there is no broadcast."""

    version: int
    receivers: tuple[Receiver, ...]

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return 1 + sum(receiver.processes for receiver in self.receivers)

    @property
    def first_ranks(self) -> list[int]:
        """The rank of each receiver's first process."""
        if not self.receivers:
            return []
        return list(accumulate((receiver.processes for receiver in self.receivers[:-1]), initial=1))

    @property
    def names(self) -> list[str]:
        """For each rank, the name of its owner."""
        engines = [receiver.name for receiver in self.receivers for _ in range(receiver.processes)]
        return ["train worker 0", *engines]
