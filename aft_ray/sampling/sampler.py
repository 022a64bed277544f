"""The sampler: a long-lived Ray actor with one engine.

Invariant: it answers only with the policy version that it is asked for. When its engine dies, or stays inside a weight
update, the actor ends its process. Ray then starts it again, and it must load the current version before it answers.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from aft_ray.coordination.colocation import GpuGate
from aft_ray.inference.engine import Engine, EngineDead
from aft_ray.inference.engine_spec import EngineSpec, prepare_environment
from aft_ray.inference.request_parameters import Prompt, SamplingSpec
from aft_ray.inference.update_phases import PhaseTimeout
from aft_ray.inference.versioned_engine import UpdateReport, VersionedEngine
from aft_ray.observe.logs import redirect_output
from aft_ray.sampling.placement_groups import wait_for_placement_group
from aft_ray.storage.records import Candidate
from aft_ray.storage.run_dir import local_model
from aft_ray.tasks.response_end import response_text
from aft_ray.weights.version_manifest import VersionManifest


@dataclass(frozen=True, slots=True)
class RefusedQuestion:
    """A question that no engine will ever answer, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class SamplerStatus:
    """What a sampler holds and has done since its process started.

    Attributes:
        version: the policy version that its engine holds; None: none.
        phase: the phase of the present weight update; "idle" when there is none.
        tokens: tokens sampled.
        busy_s: seconds in which at least one call to `sample` was running.
    """

    version: int | None
    phase: str
    tokens: int
    busy_s: float


class Sampler:
    """One engine behind an actor. All methods are asynchronous; the engine runs in a thread of its own."""

    def __init__(
        self,
        index: int,
        spec: EngineSpec,
        log_file: str | None,
        start_timeout_s: float,
        version: int | None,
        gate: GpuGate | None = None,
    ) -> None:
        """Blocks until the engine is ready.

        Args:
            version: the policy version that the model of `spec` is; None: none.
            gate: where it waits before it uses GPUs that it shares with train workers; None: the GPUs are its own.
        """
        if log_file:
            redirect_output(log_file)
        if gate is not None:
            gate.enter()
        spec = replace(spec, model=local_model(spec.model))
        prepare_environment(spec)
        if spec.executor == "ray":
            wait_for_placement_group(spec.tensor_parallel_size, start_timeout_s)
        from transformers import AutoTokenizer

        self._name = f"sampler {index}"
        self._tokens = 0
        self._busy_since: float | None = None
        self._running_calls = 0
        self._busy_s = 0.0
        self._tokenizer = AutoTokenizer.from_pretrained(spec.model, trust_remote_code=spec.trust_remote_code)
        self._eos_token_ids = spec.eos_token_ids
        self._engine = Engine(spec, start_timeout_s)
        self._versioned = VersionedEngine(self._name, self._engine, version, "weights.timeout_s")

    async def status(self) -> SamplerStatus:
        if not self._engine.alive():
            self._exit(EngineDead("its engine died while it had no request"))
        busy_s = self._busy_s + (time.monotonic() - self._busy_since if self._busy_since is not None else 0.0)
        return SamplerStatus(self._versioned.version, self._versioned.phase, self._tokens, busy_s)

    async def sample(
        self, prompts: Sequence[Prompt], sampling: SamplingSpec, version: int | None
    ) -> list[list[Candidate] | RefusedQuestion]:
        """The k candidates of each prompt, in the order of the prompts, not yet labelled.

        Args:
            version: the policy version that must answer; None: the weights that the engine was started with.

        Raises:
            WrongVersion: the engine holds another version, for instance after a restart.
        """
        self._versioned.require_version(version)
        self._start_clock()
        try:
            return list(await asyncio.gather(*(self._sample_one(prompt, sampling) for prompt in prompts)))
        except EngineDead as error:
            self._exit(error)
        finally:
            self._stop_clock()

    async def load(self, manifest: VersionManifest, tolerance: float, timeout_s: float) -> UpdateReport:
        """Loads a version and verifies its probes. Does nothing when the engine holds the version already.

        Args:
            tolerance: largest allowed difference of a probe's score, nats per token.
            timeout_s: deadline of each phase, seconds.

        Raises:
            WeightUpdateFailed: names the sampler and the phase. The sampler answers nothing until a version has been
                loaded. When the phase did not end by its deadline, the process ends.
        """
        try:
            return await self._versioned.update(manifest, tolerance, timeout_s)
        except PhaseTimeout:
            # The engine's thread may be blocked for ever. The process ends after the caller has got the error.
            asyncio.get_running_loop().call_later(1.0, os._exit, 1)
            raise
        except EngineDead as error:
            self._exit(error)

    async def sleep(self) -> None:
        """Frees the engine's GPU memory for the train workers. The sampler holds no version until one is loaded."""
        try:
            await self._versioned.drop_weights(self._engine.sleep)
        except EngineDead as error:
            self._exit(error)

    async def _sample_one(self, prompt: Prompt, sampling: SamplingSpec) -> list[Candidate] | RefusedQuestion:
        try:
            candidates = await asyncio.wrap_future(self._engine.sample(prompt, sampling))
        except ValueError as error:
            return RefusedQuestion(str(error))
        texts = [response_text(self._tokenizer, c.token_ids, self._eos_token_ids) for c in candidates]
        self._tokens += sum(len(c.token_ids) for c in candidates)
        return [
            Candidate(c.token_ids, c.logprob_sum, c.finish_reason, text)
            for c, text in zip(candidates, texts, strict=True)
        ]

    def _start_clock(self) -> None:
        if self._running_calls == 0:
            self._busy_since = time.monotonic()
        self._running_calls += 1

    def _stop_clock(self) -> None:
        self._running_calls -= 1
        if self._running_calls == 0 and self._busy_since is not None:
            self._busy_s += time.monotonic() - self._busy_since
            self._busy_since = None

    def _exit(self, error: EngineDead) -> NoReturn:
        print(f"{self._name} ends: {error}", file=sys.stderr, flush=True)
        os._exit(1)
