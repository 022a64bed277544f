"""The samplers' turns on the train workers' GPUs (`sampling.colocate`).

Invariant: engines hold GPU memory only from `begin` to `end`; the workers have moved theirs away before, and train
only after. Engines that sleep keep no weights, so every turn begins with a load.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aft_ray.coordination.coordinator import call
from aft_ray.config.run import RunConfig
from aft_ray.sampling.sampler_health import SamplersFailed
from aft_ray.sampling.sampler_pool import SamplerPool
from aft_ray.cluster.colocated_placement import EngineSeat, engine_seats


class Turns:
    """start: begins to start a pool of samplers on the seats given."""

    def __init__(self, config: RunConfig, board: Any, start: Callable[[tuple[EngineSeat, ...]], SamplerPool]) -> None:
        self._config, self._board, self._start = config, board, start
        self._pool: SamplerPool | None = None
        self._seats: tuple[EngineSeat, ...] = ()

    def begin(self, round_number: int) -> SamplerPool:
        """The samplers, once every train worker has given way before a round. New ones when the workers have moved."""
        sampling = self._config.sampling
        workers = call(self._board.wait_given_way, round_number, self._config.training.timeout_s)
        try:
            seats = engine_seats(workers, sampling.samplers, int(sampling.gpus_per_sampler))
        except ValueError as error:
            raise SamplersFailed(str(error)) from None
        if self._pool is None or seats != self._seats:
            self.close()
            self._pool, self._seats = self._start(seats), seats
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
