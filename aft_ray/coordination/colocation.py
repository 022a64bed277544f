"""Samplers and train workers that use the same GPUs, one after the other (`sampling.colocate`).

Invariant: engines hold GPU memory only between `acquire` and `release`. Before `acquire` returns, every train worker
has offloaded its states to CPU memory; it reloads them only after `release`. Sleeping engines keep no weights, so a
version must be loaded after each `acquire`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from aft_ray.cluster.colocated_placement import EnginePlacement, engine_placements
from aft_ray.config.run import RunConfig
from aft_ray.coordination.client import CoordinatorClient


class ColocatedPool(Protocol):
    """A pool of samplers whose engines can release their GPU memory."""

    def wait_ready(self, minimum: int | None = None) -> list[int]:
        """Waits until `minimum` samplers answer; returns their indices."""
        ...

    def sleep(self) -> None:
        """Has every engine release its GPU memory."""
        ...

    def close(self) -> None:
        """Ends the samplers."""
        ...


Pool = TypeVar("Pool", bound=ColocatedPool)


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

    def acquire(self, round_number: int) -> Pool:
        """The samplers, once every train worker has released its GPUs before a round.

        Starts new samplers when there are none yet, or when the train workers run on other GPUs than before.

        Raises:
            PeerFailed: training has failed, or its workers did not release their GPUs in time.
            ValueError: the train workers' GPUs are too scattered for the samplers.
        """
        sampling = self._config.sampling
        workers = self._coordinator.wait_gpus_released(round_number, self._config.training.timeout_s)
        placements = engine_placements(workers, sampling.samplers, int(sampling.gpus_per_sampler))
        if self._pool is None or placements != self._placements:
            self.close()
            self._pool, self._placements = self._start(placements), placements
            # All must start now: one that started later would find the train workers' states in its GPUs' memory.
            self._pool.wait_ready(sampling.samplers)
        return self._pool

    def release(self) -> None:
        """Has the engines release the GPUs, so that the train workers can reload their states."""
        if self._pool is not None:
            self._pool.sleep()

    def close(self) -> None:
        """Ends the samplers."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None
