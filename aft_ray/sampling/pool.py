"""The run's samplers as one thing: start them, bring them to a version, ask how they are, end them.

Invariant: every wait has a deadline, and its error names the samplers that were waited for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from aft_ray.config import RunConfig
from aft_ray.sampling.engine import EngineSpec
from aft_ray.sampling.sampler import Loaded, Sampler
from aft_ray.weights.publication import Publication, PublicationFailed

# How a traceback begins the line of an exception that is defined here.
_OURS = re.compile(r"^aft_ray(\.\w+)+: ")
# Times Ray restarts a sampler whose process ended.
RESTARTS = 5


class SamplersFailed(RuntimeError):
    """Samplers that did not start, or are gone for good. Names them and says where to look."""


def engine_spec(config: RunConfig, model: str, eos_token_id: int) -> EngineSpec:
    """The engine of a run's samplers, started from `model`."""
    sampling = config.sampling
    return EngineSpec(
        model=model,
        eos_token_id=eos_token_id,
        dtype=config.model.dtype,
        max_length=config.model.max_length,
        max_num_seqs=sampling.max_num_seqs,
        gpu=sampling.gpus_per_sampler > 0,
        threads=max(1, int(sampling.cpus_per_sampler)),
        kv_cache_gib=sampling.kv_cache_gib,
        gpu_memory_utilization=sampling.gpu_memory_utilization,
        trust_remote_code=config.model.trust_remote_code,
        seed=config.seed,
    )


@dataclass(slots=True)
class SamplerPool:
    """Handles of the sampler actors. Start with `start`, then `wait_ready` once before use."""

    actors: list[Any]
    log_files: list[str | None]
    start_timeout_s: float
    load_timeout_s: float
    tolerance: float

    @classmethod
    def start(
        cls, config: RunConfig, model: str, eos_token_id: int, log_dir: str | None, version: int | None
    ) -> SamplerPool:
        """Begins to start `sampling.samplers` actors; returns at once, so that other work can go on meanwhile.

        version: the policy version that `model` is; None when it is none, and one must be loaded first.
        """
        sampling = config.sampling
        spec = engine_spec(config, model, eos_token_id)
        logs = [os.path.join(log_dir, f"sampler-{i}.log") if log_dir else None for i in range(sampling.samplers)]
        remote = ray.remote(Sampler).options(
            num_cpus=sampling.cpus_per_sampler,
            num_gpus=sampling.gpus_per_sampler,
            max_restarts=RESTARTS,
            # A retry would re-send the very call that killed the engine; questions are re-queued one by one instead.
            max_task_retries=0,
            max_concurrency=4 * sampling.in_flight + 16,
        )
        actors = [remote.remote(i, spec, log, sampling.start_timeout_s, version) for i, log in enumerate(logs)]
        return cls(actors, logs, sampling.start_timeout_s, config.weights.timeout_s, config.score_tolerance)

    def wait_ready(self) -> None:
        """Blocks until every engine runs. Raises SamplersFailed with the engine's reason."""
        self._all("start", [actor.status.remote() for actor in self.actors], self.start_timeout_s + 60)

    def load(self, publication: Publication) -> list[Loaded]:
        """Brings every sampler to a version, proven by its probes. Raises PublicationFailed."""
        calls = [actor.load.remote(publication, self.tolerance, self.load_timeout_s) for actor in self.actors]
        try:
            return self._all(f"load version {publication.version}", calls, 3 * self.load_timeout_s + 30)
        except SamplersFailed as error:
            raise PublicationFailed(str(error)) from error

    def statuses(self) -> list[dict[str, Any]]:
        """Status of the samplers that answer within a few seconds."""
        done, _ = ray.wait([actor.status.remote() for actor in self.actors], num_returns=len(self.actors), timeout=5.0)
        statuses = []
        for reference in done:
            try:
                statuses.append(ray.get(reference))
            except RayActorError:
                continue
        return statuses

    def close(self) -> None:
        for actor in self.actors:
            ray.kill(actor)
        self.actors = []

    def _all(self, doing: str, references: Sequence[Any], timeout_s: float) -> list[Any]:
        _, late = ray.wait(list(references), num_returns=len(references), timeout=timeout_s)
        if late:
            names = ", ".join(f"sampler {references.index(reference)}" for reference in late)
            raise SamplersFailed(f"{names} did not {doing} within {timeout_s:.0f} s{self._where(references, late)}")
        results = []
        for index, reference in enumerate(references):
            try:
                results.append(ray.get(reference, timeout=timeout_s))
            except PublicationFailed:
                raise
            except (RayActorError, RayTaskError, GetTimeoutError) as error:
                cause = getattr(error, "cause", None) or error
                if isinstance(cause, PublicationFailed):
                    raise cause from None
                reason = last_line(str(cause))
                raise SamplersFailed(
                    f"sampler {index} did not {doing}: {reason}{self._where(references, [reference])}"
                ) from error
        return results

    def _where(self, references: Sequence[Any], failed: Sequence[Any]) -> str:
        logs = [self.log_files[references.index(reference)] for reference in failed]
        return f" (its output: {', '.join(log for log in logs if log)})" if any(logs) else ""


def last_line(text: str) -> str:
    """The error itself of a remote traceback: the last one of our own, which is a sentence, else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    ours = [sentence for line in lines if (sentence := _OURS.sub("", line)) != line]
    return (ours or lines or ["no reason given"])[-1]
