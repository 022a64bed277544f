"""The handles of a run's samplers, which other processes use to call them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from aft_ray.sampling.placement_groups import why_not_started
from aft_ray.sampling.sampler_health import HealthChange, SamplerHealth


@dataclass(frozen=True, slots=True)
class SamplerHandles:
    """The sampler actors, with the deadlines of calls to them. Picklable.

    Attributes:
        placement_groups: one for each sampler; empty when the samplers use the train workers' GPUs.
        log_files: of each sampler's process; None when its output is not redirected.
        minimum: the number of samplers that must answer (`sampling.min_samplers`).
        start_timeout_s: deadline of an engine's start, seconds.
        load_timeout_s: deadline of each phase of loading a version, seconds.
        tolerance: largest allowed difference of a probe's score, nats per token.
        ready: the samplers that answered when the handles were made.
    """

    actors: tuple[Any, ...]
    placement_groups: tuple[Any, ...]
    log_files: tuple[str | None, ...]
    minimum: int
    start_timeout_s: float
    load_timeout_s: float
    tolerance: float
    ready: frozenset[int] = frozenset()

    def health(self, on_change: Callable[[HealthChange], None] | None = None) -> SamplerHealth:
        """A SamplerHealth for the event loop of the calling process; it does not watch yet."""
        return SamplerHealth(self.actors, self.ready, self.minimum, self.start_timeout_s, self.why_not_ready, on_change)

    def why_not_ready(self, index: int) -> str:
        """Why a sampler that has never answered does not."""
        groups = self.placement_groups
        reason = why_not_started(groups[index]) if groups else "its engine has not started yet"
        return reason + self.logs_of([index])

    def logs_of(self, indices: Iterable[int]) -> str:
        """The log files of some samplers, in parentheses, as the end of a message; empty when there are none."""
        logs = [log for index in indices if (log := self.log_files[index])]
        return f" (its output: {', '.join(logs)})" if logs else ""
