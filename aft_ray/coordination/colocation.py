"""Samplers and train workers that use the same GPUs, one after the other (`sampling.colocate`).

Invariant: engines hold GPU memory only between `acquire` and `release`; train workers only outside. This holds too when
processes of either side end and start again (`gpu_turns`). Sleeping engines keep no weights, so a version must be
loaded after each `acquire`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import ray

from aft_ray.cluster.colocated_placement import EnginePlacement, engine_placements
from aft_ray.config.run import RunConfig
from aft_ray.coordination.client import CoordinatorClient
from aft_ray.coordination.coordinator import call


class ColocatedPool(Protocol):
    """A pool of samplers whose engines can release their GPU memory."""

    def wait_ready(self, minimum: int | None = None) -> list[int]:
        """Waits until `minimum` samplers answer; returns their indices."""
        ...

    def sleep(self, using: Callable[[], Mapping[int, str]]) -> None:
        """Has every engine release its GPU memory.

        Args:
            using: the samplers whose processes have begun to use GPUs, and the nodes of these processes.
        """
        ...

    def close(self) -> None:
        """Ends the samplers."""
        ...


Pool = TypeVar("Pool", bound=ColocatedPool)


@dataclass(frozen=True, slots=True)
class GpuGate:
    """Where a process of a colocated sampler waits before it uses the GPUs that it shares with train workers."""

    coordinator: Any
    sampler: int
    timeout_s: float

    def enter(self) -> None:
        """Blocks until it is the samplers' turn. Raises PeerFailed when the run has failed."""
        node = ray.get_runtime_context().get_node_id()
        call(self.coordinator.enter_gpus, self.sampler, node, self.timeout_s)


class Colocation(Generic[Pool]):
    """Gives the train workers' GPUs to the samplers while a round is sampled.

    Args:
        start: begins to start a pool of samplers with the given placements.
    """

    def __init__(
        self,
        config: RunConfig,
        coordinator: CoordinatorClient[Any],
        start: Callable[[tuple[EnginePlacement, ...]], Pool],
    ) -> None:
        self._config, self._coordinator, self._start = config, coordinator, start
        self._pool: Pool | None = None
        self._placements: tuple[EnginePlacement, ...] = ()
        self._acquired = False

    def acquire(self, round_number: int) -> Pool:
        """The samplers, once every train worker has released its GPUs before a round.

        Starts new samplers when there are none yet, or when the train workers run on other GPUs than before. Does
        nothing when the GPUs are the samplers' already.

        Raises:
            PeerFailed: training has failed, or its workers did not release their GPUs in time.
            ValueError: the train workers' GPUs are too scattered for the samplers.
        """
        if self._acquired and self._pool is not None:
            return self._pool
        sampling = self._config.sampling
        workers = self._coordinator.wait_gpus_released(round_number, self._config.training.timeout_s)
        self._acquired = True
        placements = engine_placements(workers, sampling.samplers, int(sampling.gpus_per_sampler))
        if self._pool is None or placements != self._placements:
            self.close()
            self._pool, self._placements = self._start(placements), placements
            # All start now, since those that start later wait for the next turn.
            self._pool.wait_ready(sampling.samplers)
        return self._pool

    def release(self) -> None:
        """Has the engines release the GPUs, so that the train workers can reload their states.

        Raises:
            SamplersFailed: an engine did not release its GPUs in time.
        """
        if self._pool is None or not self._acquired:
            return
        self._coordinator.end_samplers_turn()
        self._pool.sleep(self._coordinator.samplers_on_gpus)
        self._acquired = False
        self._coordinator.return_gpus()

    def close(self) -> None:
        """Ends the samplers."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None
