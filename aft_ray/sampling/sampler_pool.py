"""The run's samplers as one thing: start them, bring them to a version, ask how they are, end them.

Samplers come and go: the run begins with as many as it needs at least, later ones join as the cluster has room, and
one whose node is gone is waited for only while too few are left. Invariant: every wait has a deadline, and its error
names the samplers that were waited for.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayActorError

from aft_ray.cluster.colocated_placement import EnginePlacement
from aft_ray.config.run import RunConfig
from aft_ray.inference.engine_spec import EngineSpec
from aft_ray.inference.versioned_engine import UpdateReport
from aft_ray.sampling.placement_groups import actor_options, close_groups, colocated_options, open_group, waits_for
from aft_ray.sampling.sampler import Sampler
from aft_ray.sampling.sampler_health import HealthChange, SamplerHealth, SamplersFailed, reason_of
from aft_ray.sampling.version_loading import load_version
from aft_ray.weights.version_manifest import VersionManifest

# Times Ray restarts a sampler whose process or node ended. What kills engines at once parks its questions long before.
RESTARTS = 100


def engine_spec(
    config: RunConfig, model: str, eos_token_id: int, placement: EnginePlacement | None = None
) -> EngineSpec:
    """The engine of a run's samplers, started from `model`; with a `placement` on the train workers' GPUs."""
    sampling = config.sampling
    return EngineSpec(
        model=model,
        eos_token_id=eos_token_id,
        dtype=config.model.dtype,
        max_length=config.model.max_length,
        max_num_seqs=sampling.max_num_seqs,
        gpu=sampling.gpus_per_sampler > 0,
        tensor_parallel_size=sampling.tensor_parallel_size,
        pipeline_parallel_size=sampling.pipeline_parallel_size,
        threads=max(1, int(sampling.cpus_per_sampler / sampling.processes_per_sampler)),
        kv_cache_gib=sampling.kv_cache_gib,
        gpu_memory_utilization=sampling.gpu_memory_utilization,
        trust_remote_code=config.model.trust_remote_code,
        seed=config.seed,
        shared_gpus=placement.gpus if placement else (),
        joins_broadcast=config.weights.transport == "nccl",
        lora=config.lora if config.weights.transport == "lora" else None,
    )


@dataclass(frozen=True, slots=True)
class Samplers:
    """The samplers as they cross to another process: whom to ask, and how long to wait for what.

    ready: those that answered when this was made. minimum: how many must answer.
    """

    actors: tuple[Any, ...]
    groups: tuple[Any, ...]
    log_files: tuple[str | None, ...]
    minimum: int
    start_timeout_s: float
    load_timeout_s: float
    tolerance: float
    ready: frozenset[int] = frozenset()

    def health(self, tell: Callable[[HealthChange], None] | None = None) -> SamplerHealth:
        """A watch over them, for the event loop of the calling process."""
        return SamplerHealth(self.actors, self.ready, self.minimum, self.start_timeout_s, self.why, tell)

    def why(self, index: int) -> str:
        """Why a sampler that never answered does not."""
        log = self.log_files[index]
        waits = waits_for(self.groups[index]) if self.groups else "its engine has not started yet"
        return waits + (f" (its output: {log})" if log else "")

    def logs_of(self, indexes: Iterable[int]) -> str:
        """Where the output of some samplers is, as the end of a sentence; empty when nobody knows."""
        logs = [log for index in indexes if (log := self.log_files[index])]
        return f" (its output: {', '.join(logs)})" if logs else ""


class SamplerPool:
    """The driver's end of the samplers. Start with `start`, then `wait_ready` once before use."""

    def __init__(self, samplers: Samplers, tell: Callable[[HealthChange], None] | None = None) -> None:
        self._samplers = samplers
        self._loop = asyncio.new_event_loop()
        self._health = samplers.health(tell)
        self._thread = threading.Thread(target=self._loop.run_forever, name="samplers", daemon=True)
        self._thread.start()
        self._loop.call_soon_threadsafe(self._health.watch)

    @classmethod
    def start(
        cls,
        config: RunConfig,
        model: str,
        eos_token_id: int,
        log_dir: str | None,
        version: int | None,
        tell: Callable[[HealthChange], None] | None = None,
        placements: tuple[EnginePlacement, ...] | None = None,
    ) -> SamplerPool:
        """Begins to start `sampling.samplers` actors; returns at once, so that other work can go on meanwhile.

        version: the policy version that `model` is; None when it is none, and one must be loaded first. tell: is told
        of samplers that join and that are lost, from another thread. seats: where they take turns with train workers;
        none: each has resources of its own, in a placement group.
        """
        sampling = config.sampling
        logs = [os.path.join(log_dir, f"sampler-{i}.log") if log_dir else None for i in range(sampling.samplers)]
        groups = [] if placements else [open_group(index, sampling) for index in range(sampling.samplers)]
        placed = [colocated_options(placement, sampling) for placement in placements or ()]
        placed += [actor_options(group, sampling) for group in groups]
        actors = [
            ray.remote(Sampler)
            .options(
                **options,
                max_restarts=RESTARTS,
                # A retry would re-send the very call that killed the engine; questions are re-queued one by one.
                max_task_retries=0,
                max_concurrency=4 * sampling.in_flight + 16,
            )
            .remote(
                index,
                engine_spec(config, model, eos_token_id, placements[index] if placements else None),
                log,
                sampling.start_timeout_s,
                version,
            )
            for index, (options, log) in enumerate(zip(placed, logs, strict=True))
        ]
        samplers = Samplers(
            tuple(actors),
            tuple(groups),
            tuple(logs),
            sampling.min_samplers,
            sampling.start_timeout_s,
            config.weights.timeout_s,
            config.score_tolerance,
        )
        return cls(samplers, tell)

    @property
    def actors(self) -> tuple[Any, ...]:
        return self._samplers.actors

    def handles(self) -> Samplers:
        """The samplers for another process, with those that answer now."""
        return replace(self._samplers, ready=self._health.ready)

    def wait_ready(self, minimum: int | None = None) -> list[int]:
        """Blocks until `minimum` samplers answer (none: sampling.min_samplers); which do. Raises SamplersFailed."""
        return sorted(asyncio.run_coroutine_threadsafe(self._health.enough(minimum), self._loop).result())

    def load(self, manifest: VersionManifest) -> list[UpdateReport]:
        """Loads a version into the samplers that answer; see `version_loading.load_version`."""
        loading = load_version(self._samplers, self._health, manifest)
        return asyncio.run_coroutine_threadsafe(loading, self._loop).result()

    def sleep(self) -> None:
        """Has every engine give its GPUs' memory back; each must load a version before it answers again.

        Raises SamplersFailed when one does not.
        """
        calls = {self.actors[index].sleep.remote(): index for index in sorted(self._health.ready)}
        timeout_s = self._samplers.load_timeout_s
        _, late = ray.wait(list(calls), num_returns=len(calls), timeout=timeout_s) if calls else ([], [])
        if late:
            names = ", ".join(f"sampler {calls[call]}" for call in late)
            raise SamplersFailed(f"{names} did not leave its GPUs within {timeout_s:.0f} s (weights.timeout_s)")
        for call, index in calls.items():
            try:
                ray.get(call)
            except RayActorError as error:  # it holds nothing any more
                self._loop.call_soon_threadsafe(self._health.lost, index, reason_of(error))

    def statuses(self) -> list[dict[str, Any]]:
        """Status of the samplers that answer within a few seconds."""
        calls = [self.actors[index].status.remote() for index in sorted(self._health.ready)]
        done, _ = ray.wait(calls, num_returns=len(calls), timeout=5.0) if calls else ([], [])
        statuses = []
        for reference in done:
            try:
                statuses.append(ray.get(reference))
            except RayActorError:
                continue
        return statuses

    def close(self) -> None:
        """Ends the samplers and gives back what was kept for them."""
        asyncio.run_coroutine_threadsafe(self._health.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        for actor in self.actors:
            ray.kill(actor)
        close_groups(self._samplers.groups)
