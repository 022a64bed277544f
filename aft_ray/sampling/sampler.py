"""The sampler actor: a named, long-lived owner of one engine. Knows which policy version it serves.

Invariant: it answers only with the version it was asked for. An actor whose engine died or was left between two
versions ends its process, so that Ray starts a fresh one, which must load the current version before it serves.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from aft_ray.inference.engine import (
    Engine,
    EngineDead,
    EngineSpec,
    Prompt,
    SamplingSpec,
    WeightTransferFailed,
    prepare_environment,
)
from aft_ray.inference.update_phases import PhaseTimeout, UpdatePhases
from aft_ray.observe.logs import redirect_output
from aft_ray.sampling.placement_groups import wait_for_group
from aft_ray.storage.records import Candidate
from aft_ray.storage.run_dir import local_model
from aft_ray.weights.version_manifest import VersionManifest, WeightUpdateFailed


class WrongVersion(RuntimeError):
    """The sampler holds other weights than it was asked to answer with, for instance after a restart."""


@dataclass(frozen=True, slots=True)
class RefusedQuestion:
    """A question that the engine will never answer, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """How a publication reached one engine: seconds of each phase, and the probes' largest score difference.

    All zero when the engine held it already. difference: nats per token.
    """

    version: int
    rendezvous_s: float = 0.0
    fetch_s: float = 0.0
    load_s: float = 0.0
    prove_s: float = 0.0
    difference: float = 0.0

    @property
    def seconds(self) -> float:
        return self.rendezvous_s + self.fetch_s + self.load_s + self.prove_s


class Sampler:
    """One engine behind an actor. All methods are asynchronous; the engine works in a thread of its own."""

    def __init__(
        self, index: int, spec: EngineSpec, log_file: str | None, start_timeout_s: float, version: int | None
    ) -> None:
        if log_file:
            redirect_output(log_file)
        spec = replace(spec, model=local_model(spec.model))
        prepare_environment(spec)
        if spec.executor == "ray":
            wait_for_group(spec.tensor_parallel_size, start_timeout_s)
        from transformers import AutoTokenizer

        self._name = f"sampler {index}"
        self._version = version
        self._phases = UpdatePhases()
        self._loading = asyncio.Lock()
        self._tokens = 0
        self._busy_since: float | None = None
        self._active = 0
        self._busy_s = 0.0
        self._tokenizer = AutoTokenizer.from_pretrained(spec.model, trust_remote_code=spec.trust_remote_code)
        self._engine = Engine(spec, start_timeout_s)

    async def status(self) -> dict[str, Any]:
        """Version, phase of a publication, tokens generated and seconds spent generating since the start."""
        if not self._engine.alive():
            self._die(EngineDead("its engine died while nothing was asked of it"))
        busy = self._busy_s + (time.monotonic() - self._busy_since if self._busy_since is not None else 0.0)
        return {"version": self._version, "phase": self._phases.name, "tokens": self._tokens, "busy_s": busy}

    async def answer(
        self, prompts: Sequence[Prompt], how: SamplingSpec, version: int | None
    ) -> list[list[Candidate] | RefusedQuestion]:
        """k unlabelled candidates a prompt, in order. `version` None: whatever weights the engine started with."""
        if version != self._version:
            raise WrongVersion(f"{self._name} holds version {self._version}, not {version}")
        self._start_clock()
        try:
            return list(await asyncio.gather(*(self._answer(prompt, how) for prompt in prompts)))
        except EngineDead as error:
            self._die(error)
        finally:
            self._stop_clock()

    async def load(self, manifest: VersionManifest, tolerance: float, timeout_s: float) -> UpdateReport:
        """Brings the engine to a version and proves it by its probes. Idempotent.

        Raises WeightUpdateFailed naming the engine and the phase. The engine then answers nothing until a delivery has
        come through; when it stands still, the process ends.
        """
        async with self._loading:
            if self._version == manifest.version:
                return UpdateReport(manifest.version)
            self._version = None
            self._phases = UpdatePhases()
            try:
                return await self._load(manifest, tolerance, timeout_s)
            except (WeightTransferFailed, PhaseTimeout) as error:
                if isinstance(error, PhaseTimeout):
                    # Its thread may never come back. Later, so that the caller still learns why.
                    asyncio.get_running_loop().call_later(1.0, os._exit, 1)
                raise WeightUpdateFailed(
                    f"{self._name} did not get through phase {self._phases.name!r} of publishing version "
                    f"{manifest.version}: {error}; weights.timeout_s ({timeout_s:.0f} s a phase) sets the deadline"
                ) from None
            except EngineDead as error:
                self._die(error)
            finally:
                self._phases.leave()

    async def sleep(self) -> None:
        """Leaves the GPUs to the train workers. It holds no version then, until one is loaded."""
        async with self._loading:
            self._version = None
            try:
                await asyncio.wrap_future(self._engine.sleep())
            except EngineDead as error:
                self._die(error)

    async def _load(self, manifest: VersionManifest, tolerance: float, timeout_s: float) -> UpdateReport:
        phases = self._phases
        phases.enter("fetch")
        # The weights first: there may be no room for the KV cache beside what loading needs.
        await phases.watch(self._engine.wake("weights"), timeout_s)
        update = self._engine.update_weights(manifest.calls(timeout_s), phases.enter, manifest.adapter)
        await phases.watch(update, timeout_s)
        await phases.watch(self._engine.wake("kv_cache"), timeout_s)
        phases.enter("prove")
        scores = [self._engine.score(p.prompt_token_ids, p.response_token_ids) for p in manifest.probes]
        difference = manifest.verify_probes(
            [await phases.watch(score, timeout_s) for score in scores], tolerance, self._name
        )
        phases.leave()
        self._version = manifest.version
        took = phases.seconds
        return UpdateReport(
            manifest.version, took["rendezvous"], took["fetch"], took["load"], took["prove"], difference
        )

    async def _answer(self, prompt: Prompt, how: SamplingSpec) -> list[Candidate] | RefusedQuestion:
        try:
            candidates = await asyncio.wrap_future(self._engine.sample(prompt, how))
        except ValueError as error:
            return RefusedQuestion(str(error))
        texts = self._tokenizer.batch_decode([c.token_ids for c in candidates], skip_special_tokens=True)
        self._tokens += sum(len(c.token_ids) for c in candidates)
        return [
            Candidate(c.token_ids, c.logprob_sum, c.finish_reason, text)
            for c, text in zip(candidates, texts, strict=True)
        ]

    def _start_clock(self) -> None:
        if self._active == 0:
            self._busy_since = time.monotonic()
        self._active += 1

    def _stop_clock(self) -> None:
        self._active -= 1
        if self._active == 0 and self._busy_since is not None:
            self._busy_s += time.monotonic() - self._busy_since
            self._busy_since = None

    def _die(self, error: EngineDead) -> NoReturn:
        print(f"{self._name} ends: {error}", file=sys.stderr, flush=True)
        os._exit(1)
