"""The samplers' turns on the train workers' GPUs (`sampling.colocate`).

Invariant: engines hold GPU memory only from `begin` to `end`; the workers have moved theirs away before, and train
only after. Engines that sleep keep no weights, so every turn begins with a load.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aft_ray.cluster.colocated_placement import EnginePlacement, engine_placements
from aft_ray.config.run import RunConfig
from aft_ray.coordination.coordinator import call
from aft_ray.sampling.sampler_health import SamplersFailed
from aft_ray.sampling.sampler_pool import SamplerPool


class Colocation:
    """start: begins to start a pool of samplers on the seats given."""

    def __init__(
        self, config: RunConfig, coordinator: Any, start: Callable[[tuple[EnginePlacement, ...]], SamplerPool]
    ) -> None:
        self._config, self._coordinator, self._start = config, coordinator, start
        self._pool: SamplerPool | None = None
        self._placements: tuple[EnginePlacement, ...] = ()

    def begin(self, round_number: int) -> SamplerPool:
        """The samplers, once every train worker has given way before a round. New ones when the workers have moved."""
        sampling = self._config.sampling
        workers = call(self._coordinator.wait_gpus_released, round_number, self._config.training.timeout_s)
        try:
            placements = engine_placements(workers, sampling.samplers, int(sampling.gpus_per_sampler))
        except ValueError as error:
            raise SamplersFailed(str(error)) from None
        if self._pool is None or placements != self._placements:
            self.close()
            self._pool, self._placements = self._start(placements), placements
            # One that started later would meet the workers on its GPUs.
            self._pool.wait_ready(sampling.samplers)
        return self._pool

    def end(self) -> None:
        """Gives the GPUs back to the train workers."""
        if self._pool is not None:
            self._pool.sleep()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None
