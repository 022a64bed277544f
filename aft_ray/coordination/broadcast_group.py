"""A meeting: train worker 0 and the engines form a group of their own, for one version, to stream its weights.

The conductor invites, the trainer opens a table, the engines take their places. Invariant: rank 0 is the trainer; an
engine's processes have the ranks from its place's `first_rank` on, in vLLM's own order.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from aft_ray.weights.broadcast.layout import Layout


class BroadcastFailed(RuntimeError):
    """The stream broke off, or did not begin. Names the phase; what missed it takes the model directory."""


@dataclass(frozen=True, slots=True)
class Receiver:
    """An engine that is invited, and how many processes it has."""

    name: str
    processes: int


@dataclass(frozen=True, slots=True)
class BroadcastGroup:
    """To the trainer: who will come to the meeting of a version. Without guests there is none."""

    version: int
    guests: tuple[Receiver, ...]

    @property
    def world_size(self) -> int:
        return 1 + sum(guest.processes for guest in self.guests)

    @property
    def first_ranks(self) -> list[int]:
        """The rank of each guest's first process."""
        return list(accumulate((guest.processes for guest in self.guests[:-1]), initial=1)) if self.guests else []

    @property
    def names(self) -> list[str]:
        """Whose process each rank is."""
        return ["train worker 0", *(guest.name for guest in self.guests for _ in range(guest.processes))]


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """Where the group of a meeting is formed: a store of train worker 0's."""

    address: str
    port: int


@dataclass(frozen=True, slots=True)
class BroadcastMembership:
    """All that an engine needs to take part."""

    table: StoreAddress
    first_rank: int
    world_size: int
    layout: Layout
