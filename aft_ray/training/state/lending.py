"""A train worker's side of `sampling.colocate`: it lends its GPU to the samplers before each round.

Invariant: from the moment at which the worker says that its GPU is free, it has no memory there until the round is
ready and the coordinator has given the GPU back.
"""

from __future__ import annotations

from typing import Any

import torch

from aft_ray.cluster.colocated_placement import WorkerPlacement
from aft_ray.config.run import RunConfig
from aft_ray.coordination.coordinator import call
from aft_ray.training.state.offload import OffloadedStates, offload_states, release_memory, worker_placement


class GpuLender:
    """Lends the GPU of one train worker. All ranks call its methods together."""

    def __init__(self, config: RunConfig, coordinator: Any, rank: int, workers: int) -> None:
        self._coordinator, self._rank, self._workers = coordinator, rank, workers
        self._timeout_s = config.rounds.timeout_s
        self._gpu = config.training.gpus_per_worker > 0

    def lend(self, engine: Any, round_number: int) -> float:
        """Lets the samplers use the GPU until they have sampled a round. Returns the seconds that this took.

        Args:
            engine: the DeepSpeed engine; None when there is none yet, or its states are not needed any more.
        """
        states, placement = self._release(engine, round_number)
        waited_s = float(call(self._coordinator.wait_ready, round_number, self._timeout_s))
        waited_s += float(call(self._coordinator.take_gpus, placement, self._timeout_s))
        if states is not None:
            states.reload()
        return waited_s

    def give_up(self, engine: Any, round_number: int) -> None:
        """Lets the samplers use the GPU from now on, as before a round; the engine cannot be used any more."""
        self._release(engine, round_number)

    def _release(self, engine: Any, round_number: int) -> tuple[OffloadedStates | None, WorkerPlacement]:
        """Tells the coordinator that the GPU is free before a round, after moving the states away."""
        placement = worker_placement(self._rank, self._workers)
        states = None
        if self._gpu:
            device = torch.device("cuda", torch.cuda.current_device())
            if engine is None:
                release_memory(device)
            else:
                states = offload_states(device)
        call(self._coordinator.release_gpus, round_number, placement)
        return states, placement
