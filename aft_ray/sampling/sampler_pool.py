"""The pool of a run's samplers: starts them, loads versions into them, and ends them.

The run begins when the minimum of samplers answers. Later ones join as the cluster has room, and a lost one is waited
for only while fewer than the minimum are left. Invariant: every wait has a deadline, and its error names the samplers
that were waited for.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError

from aft_ray.cluster.colocated_placement import EnginePlacement
from aft_ray.config.run import RunConfig
from aft_ray.coordination.colocation import GpuGate
from aft_ray.inference.engine_spec import EngineSpec
from aft_ray.inference.versioned_engine import UpdateReport
from aft_ray.sampling.placement_groups import (
    actor_options,
    colocated_actor_options,
    create_placement_group,
    remove_placement_groups,
)
from aft_ray.sampling.sampler import Sampler, SamplerStatus
from aft_ray.sampling.sampler_handles import SamplerHandles
from aft_ray.sampling.sampler_health import HealthChange, SamplersFailed, reason_of
from aft_ray.sampling.version_loading import load_version
from aft_ray.weights.version_manifest import VersionManifest

# How often Ray restarts a sampler whose process or node ended. It is far more than `sampling.attempts`, after which a
# question that kills its engine has failed.
MAX_RESTARTS = 100
# Seconds within which a sampler must return its status to be among `statuses`.
_STATUS_TIMEOUT_S = 5.0
# Seconds between two looks at which samplers still use GPUs.
_SLEEP_POLL_S = 0.2


def sampler_engine_spec(
    config: RunConfig, model: str, eos_token_ids: tuple[int, ...], placement: EnginePlacement | None = None
) -> EngineSpec:
    """The engine of a run's samplers, started from `model`. With a `placement` it uses the train workers' GPUs."""
    sampling = config.sampling
    return EngineSpec(
        model=model,
        eos_token_ids=eos_token_ids,
        dtype=config.model.dtype,
        max_length=config.model.max_length,
        max_num_seqs=sampling.max_num_seqs,
        gpu=sampling.gpus_per_sampler > 0,
        tensor_parallel_size=sampling.tensor_parallel_size,
        pipeline_parallel_size=sampling.pipeline_parallel_size,
        threads=max(1, int(sampling.cpus_per_sampler / sampling.processes_per_sampler)),
        kv_cache_gib=sampling.kv_cache_gib,
        gpu_memory_utilization=sampling.gpu_memory_share,
        trust_remote_code=config.model.trust_remote_code,
        seed=config.seed,
        shared_gpus=placement.gpus if placement else (),
        receives_broadcasts=config.weights.transport == "nccl",
        lora=config.lora if config.weights.transport == "lora" else None,
        arguments=sampling.engine_args,
    )


class SamplerPool:
    """The samplers, as the driver uses them. Make one with `start`, and call `wait_ready` before the first use.

    A thread with an event loop of its own watches the samplers until `close`.
    """

    def __init__(self, handles: SamplerHandles, on_change: Callable[[HealthChange], None] | None = None) -> None:
        """
        Args:
            on_change: is called, from the pool's thread, when a sampler becomes ready and when one is lost.
        """
        self._handles = handles
        self._loop = asyncio.new_event_loop()
        self._health = handles.health(on_change)
        self._thread = threading.Thread(target=self._loop.run_forever, name="samplers", daemon=True)
        self._thread.start()
        self._loop.call_soon_threadsafe(self._health.watch)

    @classmethod
    def start(
        cls,
        config: RunConfig,
        model: str,
        eos_token_ids: tuple[int, ...],
        log_dir: str | None,
        version: int | None,
        on_change: Callable[[HealthChange], None] | None = None,
        placements: tuple[EnginePlacement, ...] | None = None,
        coordinator: Any = None,
    ) -> SamplerPool:
        """Begins to start `sampling.samplers` actors, and returns at once.

        Args:
            version: the policy version that `model` is; None: it is none, so that a version must be loaded first.
            placements: where the samplers use the GPUs of train workers; None: each sampler has resources of its own,
                in a placement group.
            coordinator: the coordinator's actor, which tells colocated samplers when they may use the GPUs.
        """
        sampling = config.sampling
        logs = [os.path.join(log_dir, f"sampler-{i}.log") if log_dir else None for i in range(sampling.samplers)]
        groups = [] if placements else [create_placement_group(index, sampling) for index in range(sampling.samplers)]
        options = [colocated_actor_options(placement, sampling) for placement in placements or ()]
        options += [actor_options(group, sampling) for group in groups]
        actors = [
            ray.remote(Sampler)
            .options(
                **of_actor,
                max_restarts=MAX_RESTARTS,
                # Ray would retry the very call that killed the engine; the run retries its questions one by one.
                max_task_retries=0,
                max_concurrency=4 * sampling.in_flight + 16,
            )
            .remote(
                index,
                sampler_engine_spec(config, model, eos_token_ids, placements[index] if placements else None),
                log,
                sampling.start_timeout_s,
                version,
                GpuGate(coordinator, index, config.rounds.timeout_s) if placements else None,
            )
            for index, (of_actor, log) in enumerate(zip(options, logs, strict=True))
        ]
        handles = SamplerHandles(
            tuple(actors),
            tuple(groups),
            tuple(logs),
            sampling.min_samplers,
            sampling.start_timeout_s,
            config.weights.timeout_s,
            config.score_tolerance,
        )
        return cls(handles, on_change)

    @property
    def actors(self) -> tuple[Any, ...]:
        return self._handles.actors

    def handles(self) -> SamplerHandles:
        """The handles for another process, with the samplers that are ready now."""
        return replace(self._handles, ready=self._health.ready)

    def wait_ready(self, minimum: int | None = None) -> list[int]:
        """Blocks until at least `minimum` samplers answer (None: sampling.min_samplers); returns those that do.

        Raises:
            SamplersFailed: too few answer in time.
        """
        waiting = self._health.wait_for_minimum(minimum)
        return sorted(asyncio.run_coroutine_threadsafe(waiting, self._loop).result())

    def load(self, manifest: VersionManifest) -> list[UpdateReport]:
        """Loads a version into the samplers that answer; see `version_loading.load_version`."""
        loading = load_version(self._handles, self._health, manifest)
        return asyncio.run_coroutine_threadsafe(loading, self._loop).result()

    def sleep(self, using: Callable[[], Mapping[int, str]]) -> None:
        """Has every engine free its GPU memory. Each sampler must load a version before it answers again.

        An engine that is starting is waited for. Of a process that has ended nothing is left to free.

        Args:
            using: the samplers whose processes have begun to use GPUs, and the nodes of these processes.

        Raises:
            SamplersFailed: an engine did not free its memory in time.
        """
        handles = self._handles
        timeout_s = handles.start_timeout_s + handles.load_timeout_s
        deadline = time.monotonic() + timeout_s
        calls: dict[int, Any] = {}
        free: set[int] = set()
        while True:
            nodes = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
            left = {index for index, node in using().items() if node in nodes} - free
            if not left:
                return
            if time.monotonic() > deadline:
                names = ", ".join(f"sampler {index}" for index in sorted(left))
                raise SamplersFailed(
                    f"{names} did not free its GPUs within {timeout_s:.0f} s "
                    f"(sampling.start_timeout_s and weights.timeout_s){handles.logs_of(left)}"
                )
            for index in left - calls.keys():
                calls[index] = self.actors[index].sleep.remote()
            done, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=_SLEEP_POLL_S)
            for index in [index for index, call in calls.items() if call in done]:
                try:
                    ray.get(calls.pop(index))
                except ActorUnavailableError:
                    continue  # it may be alive: it is asked again
                except RayActorError as error:  # its process has ended, so that it uses no memory
                    self._loop.call_soon_threadsafe(self._health.mark_lost, index, reason_of(error))
                free.add(index)

    def statuses(self) -> list[SamplerStatus]:
        """The status of each sampler that returns it within a few seconds."""
        calls = [self.actors[index].status.remote() for index in sorted(self._health.ready)]
        done, _ = ray.wait(calls, num_returns=len(calls), timeout=_STATUS_TIMEOUT_S) if calls else ([], [])
        statuses = []
        for call in done:
            try:
                statuses.append(ray.get(call))
            except RayActorError:
                continue
        return statuses

    def close(self) -> None:
        """Ends the samplers, and releases the resources that were reserved for them."""
        asyncio.run_coroutine_threadsafe(self._health.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        for actor in self.actors:
            ray.kill(actor)
        remove_placement_groups(self._handles.placement_groups)
