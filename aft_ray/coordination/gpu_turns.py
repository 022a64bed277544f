"""Whose turn it is on GPUs that samplers and train workers share (`sampling.colocate`). Pure state, without Ray.

Invariant: train workers and samplers never have memory on the GPUs at the same time, whichever of them ends or starts
again meanwhile. The turn of the samplers begins when every train worker has released its GPUs; it ends when no process
of a sampler uses them any more. A sampler that Ray starts again outside its turn waits before it starts its engine; so
do train workers that Ray Train starts again in the samplers' turn.
"""

from __future__ import annotations

from enum import Enum, auto

from aft_ray.cluster.colocated_placement import WorkerPlacement


class Turn(Enum):
    """Who may take memory on the GPUs. While the samplers' turn is ending, nobody may."""

    WORKERS = auto()
    SAMPLERS = auto()
    ENDING = auto()


class GpuTurns:
    """The turns of one run.

    Attributes:
        turn: whose turn it is.
        samplers: the samplers whose processes may use GPUs, and the nodes of these processes.
    """

    def __init__(self) -> None:
        self.turn = Turn.WORKERS
        self.samplers: dict[int, str] = {}
        self._incarnation = ""
        self._released: dict[int, WorkerPlacement] = {}
        self._round = -1

    def release(self, round_number: int, placement: WorkerPlacement) -> None:
        """Records that a train worker has no memory on its GPUs, and takes none before a round is ready."""
        self._forget_others(placement)
        if round_number != self._round:
            self._round, self._released = round_number, {}
        self._released[placement.rank] = placement

    def take(self, placement: WorkerPlacement) -> None:
        """Records that a train worker uses its GPUs again."""
        assert self.turn is Turn.WORKERS
        self._forget_others(placement)
        self._released.pop(placement.rank, None)

    def released(self, round_number: int) -> list[WorkerPlacement]:
        """The placements of all train workers once each has released its GPUs before this round; empty until then."""
        placements = list(self._released.values()) if round_number == self._round else []
        return placements if placements and len(placements) == placements[0].workers else []

    def enter(self, sampler: int, node: str) -> None:
        """Records that a process of a sampler is about to use its GPUs."""
        assert self.turn is Turn.SAMPLERS
        self.samplers[sampler] = node

    def leave(self, sampler: int) -> None:
        """Records that no process of a sampler uses GPUs: the one before has ended."""
        self.samplers.pop(sampler, None)

    def _forget_others(self, placement: WorkerPlacement) -> None:
        """Forgets train workers that ran before the one with this placement: they have ended."""
        if placement.incarnation != self._incarnation:
            self._incarnation, self._released = placement.incarnation, {}
