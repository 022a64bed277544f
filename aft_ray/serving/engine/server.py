"""The engine of the service: ray.serve.llm's LLMServer, which also samples for the reasoner and loads new versions.

Invariant: a call is answered wholly by one policy version, the one that its reply names. An update waits until no
candidate is being sampled, and calls that arrive meanwhile wait for the update. When the new version cannot be loaded
or its probes do not verify, the engine loads the previous one again; when that fails too, it answers nothing and Serve
replaces the replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer

from aft_ray.cluster.compat import ray_vllm_engine
from aft_ray.config.run import ModelConfig
from aft_ray.inference.request_parameters import (
    Prompt,
    SamplingSpec,
    candidates_of,
    request_parameters,
    response_room,
)
from aft_ray.inference.update_phases import PhaseTimeout
from aft_ray.inference.versioned_engine import VersionedEngine, WrongVersion
from aft_ray.serving.engine.client import EngineClient, bad_request_errors
from aft_ray.serving.engine.openai_requests import with_ends, with_template_values
from aft_ray.serving.engine.read_write_lock import ReadWriteLock
from aft_ray.storage.records import Candidate
from aft_ray.storage.run_dir import local_model
from aft_ray.weights.version_manifest import VersionManifest


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """Asks for some of the candidates of a question.

    Attributes:
        sampling: how they are sampled. Its k is not used.
        indices: which candidates are wanted.
        seed: the seed of the candidate with index 0. The candidate with index i has the seed `seed + i`, as in one vLLM
            request for all of them.
        flush_interval_s: candidates that finish within this many seconds are sent together.
        version: the policy version that must answer; None: any.
    """

    prompt_token_ids: list[int]
    sampling: SamplingSpec
    indices: tuple[int, ...]
    seed: int
    flush_interval_s: float = 0.0
    version: int | None = None


@dataclass(frozen=True, slots=True)
class SampleChunk:
    """Finished candidates with their indices, without texts, and the policy version that sampled them."""

    version: int | None
    candidates: tuple[tuple[int, Candidate], ...]


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """The policy version that an engine answers with, and the seconds since it began to answer requests."""

    version: int | None
    seconds: float


@dataclass(frozen=True, slots=True)
class PolicySpec:
    """What a policy server needs besides its LLMConfig.

    Attributes:
        manifest: the version that the engine starts with; None when the model does not come from a run.
        model: how the model is asked in a chat.
        eos_token_ids: the tokens that end a response.
        tolerance: largest allowed difference of a probe's score, nats per token.
        drain_s: how long an update waits for candidates that are being sampled, seconds.
        update_timeout_s: deadline of each phase of an update, seconds.
        follow_s: seconds between two checks for a new version.
    """

    manifest: VersionManifest | None
    model: ModelConfig
    eos_token_ids: tuple[int, ...]
    max_length: int
    tolerance: float
    drain_s: float
    update_timeout_s: float
    follow_s: float


class PolicyEngine(ray_vllm_engine()):  # type: ignore[misc]
    """Ray's vLLM engine, which gives the server access to vLLM's client."""

    def _start_async_llm_engine(self, vllm_engine_args: Any, vllm_engine_config: Any, placement_group: Any) -> Any:
        parallel = vllm_engine_config.parallel_config
        if parallel.world_size == 1 and parallel.distributed_executor_backend == "mp":
            # Saves one process, which every step of a CPU engine would pass through. Ray has no setting for it.
            parallel.distributed_executor_backend = "uni"
        return super()._start_async_llm_engine(vllm_engine_args, vllm_engine_config, placement_group)

    @property
    def client(self) -> Any:
        """vLLM's AsyncLLM."""
        return self._engine_client


class PolicyServer(LLMServer):  # type: ignore[misc]
    """A Serve replica with one engine. Its OpenAI methods are LLMServer's; the reasoner calls `sample`."""

    async def __init__(  # type: ignore[misc]
        self, llm_config: LLMConfig, spec: PolicySpec, rollout: Any = None
    ) -> None:
        """Starts the engine, and verifies the probes of the version that it starts with.

        Args:
            rollout: handle of the Rollout deployment, whose versions the engine follows; None: it keeps its version.
        """
        self._spec = spec
        self._lock = ReadWriteLock()
        self._failure: str | None = None  # why the engine answers nothing
        # The version that answers. During an update it is the previous one, which the engine may load again.
        self._manifest = spec.manifest if rollout is None else await rollout.newest_version.remote()
        if self._manifest is not None:
            model = await asyncio.to_thread(local_model, self._manifest.model)
            llm_config = _with_model(llm_config, model)
        await super().__init__(llm_config, engine_cls=PolicyEngine)
        self._client = EngineClient(self.engine.client)
        self._versioned = VersionedEngine(
            f"the engine of {llm_config.model_id}", self._client, self._version, "engine.start_timeout_s"
        )
        if self._manifest is not None:
            await self._versioned.verify_probes(self._manifest, spec.tolerance)
        self._answering_since = time.monotonic()
        self._following = asyncio.create_task(self._follow(rollout)) if rollout is not None else None

    async def sample(self, request: SampleRequest) -> AsyncIterator[SampleChunk]:
        """The candidates, in the order in which they finish. Closing the iterator ends those that are being sampled.

        Raises:
            WrongVersion: the engine does not hold the version that is asked for.
            BadRequest: vLLM refuses the request, or the prompt leaves no room for a response.
        """
        async with self._answering(request) as version:
            parameters = [(index, self._parameters(request, index)) for index in request.indices]
            running = {asyncio.ensure_future(self._sample_one(request, *one)) for one in parameters}
            try:
                while running:
                    await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    done, running = await asyncio.wait(running, timeout=request.flush_interval_s)
                    yield SampleChunk(version, tuple(task.result() for task in done))
            finally:
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)

    async def sample_tokens(self, request: SampleRequest) -> AsyncIterator[SampleChunk | list[int]]:
        """A single candidate as it is sampled: lists of new token ids, then the whole candidate. Raises as `sample`."""
        async with self._answering(request) as version:
            sent = 0
            (index,) = request.indices
            parameters = self._parameters(request, index)
            parameters.output_kind = type(parameters.output_kind).CUMULATIVE
            async for output in self._client.generate(request.prompt_token_ids, parameters):
                new = list(output.outputs[0].token_ids[sent:])
                sent += len(new)
                yield new
                last = output
            yield SampleChunk(version, ((index, candidates_of(last)[0]),))

    async def chat(self, request: Any, raw_request_info: Any = None) -> Any:
        """LLMServer's `chat`, in which the model is asked as in training."""
        request = with_template_values(with_ends(request, self._spec.eos_token_ids), self._spec.model)
        return await super().chat(request, raw_request_info)

    async def completions(self, request: Any, raw_request_info: Any = None) -> Any:
        """LLMServer's `completions`, in which responses end as in training."""
        return await super().completions(with_ends(request, self._spec.eos_token_ids), raw_request_info)

    async def engine_status(self) -> EngineStatus:
        """The version that answers, which is the previous one during an update, and for how long."""
        return EngineStatus(self._version, time.monotonic() - self._answering_since)

    async def check_health(self) -> None:
        """Raises when the replica must be replaced. Serve calls it."""
        if self._failure is not None:
            raise RuntimeError(self._failure)
        await super().check_health()

    @property
    def _version(self) -> int | None:
        """The version that answers; None for a model that is not from a run."""
        return self._manifest.version if self._manifest is not None else None

    @contextlib.asynccontextmanager
    async def _answering(self, request: SampleRequest) -> AsyncIterator[int | None]:
        """Keeps the weights as they are; yields their version."""
        async with self._lock.shared():
            if self._failure is not None:
                raise WrongVersion(self._failure)
            if request.version is not None:
                self._versioned.require_version(request.version)
            yield self._version

    async def _sample_one(self, request: SampleRequest, index: int, parameters: Any) -> tuple[int, Candidate]:
        async for output in self._client.generate(request.prompt_token_ids, parameters):
            last = output
        return index, candidates_of(last)[0]

    def _parameters(self, request: SampleRequest, index: int) -> Any:
        """vLLM's parameters for one candidate. Raises BadRequest."""
        prompt = Prompt(request.prompt_token_ids, request.seed + index)
        wanted = request.sampling
        sampling = SamplingSpec(1, wanted.temperature, wanted.top_p, wanted.max_tokens)
        with bad_request_errors():
            room = response_room(len(request.prompt_token_ids), self._spec.max_length)
            return request_parameters(prompt, sampling, min(sampling.max_tokens, room), self._spec.eos_token_ids)

    async def _follow(self, rollout: Any) -> None:
        """Asks the rollout every `follow_s` seconds for a version to load, and loads it."""
        engine_id = uuid.uuid4().hex
        while True:
            await asyncio.sleep(self._spec.follow_s)
            try:
                current = self._manifest
                manifest = await rollout.begin_update.remote(engine_id, self._version)
                if manifest is None or current is None:
                    continue
                failure = await self._update(manifest, current)
                await rollout.end_update.remote(engine_id, manifest.version, failure)
            except Exception as error:  # the next check may succeed; until then the current version answers
                print(f"following the run failed for now: {error}", flush=True)

    async def _update(self, manifest: VersionManifest, previous: VersionManifest) -> str | None:
        """Loads a version in place of the previous one. Returns None, or why the version could not be loaded.

        Raises:
            TimeoutError: the running candidates were not finished in time. Nothing has changed then.
        """
        # A copy from an object store takes minutes. The engine answers meanwhile, and a failed copy is tried again.
        await asyncio.to_thread(local_model, manifest.model)
        tolerance, timeout_s = self._spec.tolerance, self._spec.update_timeout_s
        async with self._lock.exclusive(self._spec.drain_s):
            try:
                await self._versioned.update(manifest, tolerance, timeout_s)
                self._manifest = manifest
                return None
            except PhaseTimeout as error:
                # The engine may be blocked for ever, so it gets no further call.
                reason = self._failure = f"version {manifest.version} could not be loaded: {error}"
                return reason
            except Exception as error:
                reason = f"version {manifest.version} could not be loaded: {error}"
            try:
                await self._versioned.update(previous, tolerance, timeout_s)
            except Exception as error:
                # The engine's weights are in an unknown state.
                self._failure = f"{reason}; the previous version could not be loaded either: {error}"
            return reason


def _with_model(llm_config: LLMConfig, model: str) -> LLMConfig:
    """A copy of the config that loads another model. The given object has already derived values from its own model."""
    given = {name: getattr(llm_config, name) for name in llm_config.model_fields_set}
    loading = {"model_id": llm_config.model_id, "model_source": model}
    return LLMConfig(**given | {"model_loading_config": loading})
