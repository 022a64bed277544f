"""The engine side: ray.serve.llm's LLMServer, which also samples compactly and takes new weights without a restart.

Invariant: a call is answered wholly by one policy version, the one that it names in its reply. New weights wait until
no candidate is being sampled, calls that arrive meanwhile wait for them, and weights that do not prove themselves by
their probes never answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer

from aft_ray.inference.engine import (
    NoRoom,
    Prompt,
    SamplingSpec,
    candidates_of,
    request_parameters,
    response_room,
    score_of,
    scoring_parameters,
)
from aft_ray.serving.engine.read_write_lock import ReadWriteLock
from aft_ray.storage.records import Candidate
from aft_ray.storage.run_dir import local_model
from aft_ray.weights.version_manifest import VersionManifest


class WrongVersion(RuntimeError):
    """The engine does not hold the policy version asked for: it has gone on to another, or failed to."""


class BadRequest(ValueError):
    """The engine refuses the request for what it asks, as one sentence."""


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """Those candidates of a question that have the given indices.

    how: its k is not read. seed: of the candidate with index 0; each next one has one more, as in one vLLM request for
    all of them. together_s: candidates that finish within so many seconds of each other travel together. version: None:
    any.
    """

    prompt_token_ids: list[int]
    how: SamplingSpec
    indices: tuple[int, ...]
    seed: int
    together_s: float = 0.0
    version: int | None = None


@dataclass(frozen=True, slots=True)
class SampleChunk:
    """Candidates as they are finished, by their indices, without texts; the policy version that made them."""

    version: int | None
    candidates: tuple[tuple[int, Candidate], ...]


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """What an engine holds, and for how many seconds it has been answering."""

    version: int | None
    seconds: float


@dataclass(frozen=True, slots=True)
class PolicySpec:
    """What a policy server is beside its LLMConfig.

    publication: the weights to start with; None when they are of no run. tolerance: largest difference of a probe's
    score, nats per token. drain_s: deadline of waiting for running candidates before weights change.
    """

    manifest: VersionManifest | None
    eos_token_id: int
    max_length: int
    tolerance: float
    drain_s: float
    follow_s: float


class PolicyEngine(VLLMEngine):  # type: ignore[misc]
    """Ray's vLLM engine with its client within reach of the server."""

    def _start_async_llm_engine(self, vllm_engine_args: Any, vllm_engine_config: Any, placement_group: Any) -> Any:
        parallel = vllm_engine_config.parallel_config
        if parallel.world_size == 1 and parallel.distributed_executor_backend == "mp":
            # One process less for every step of a CPU engine; Ray knows no way to ask for it.
            parallel.distributed_executor_backend = "uni"
        return super()._start_async_llm_engine(vllm_engine_args, vllm_engine_config, placement_group)

    @property
    def client(self) -> Any:
        """vLLM's AsyncLLM."""
        return self._engine_client


class PolicyServer(LLMServer):  # type: ignore[misc]
    """One engine. Its OpenAI methods are LLMServer's; `sample` is what the reasoner asks."""

    async def __init__(  # type: ignore[misc]
        self, llm_config: LLMConfig, spec: PolicySpec, rollout: Any = None
    ) -> None:
        self._spec = spec
        self._lock = ReadWriteLock()
        self._failure: str | None = None
        self._manifest = spec.manifest if rollout is None else await rollout.current.remote()
        if self._manifest is not None:
            model = await asyncio.to_thread(local_model, self._manifest.model)
            llm_config = _with_model(llm_config, model)
        await super().__init__(llm_config, engine_cls=PolicyEngine)
        if self._manifest is not None:
            await self._verify_probes(self._manifest)
        self._began = time.monotonic()
        self._following = asyncio.create_task(self._follow(rollout)) if rollout is not None else None

    async def sample(self, draw: SampleRequest) -> AsyncIterator[SampleChunk]:
        """The candidates as they are finished; closing the iterator ends those that still run.

        Raises WrongVersion, or BadRequest when the prompt leaves no room for a response.
        """
        async with self._answering(draw) as version:
            running = {asyncio.ensure_future(request) for request in self._requests(draw)}
            try:
                while running:
                    await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    done, running = await asyncio.wait(running, timeout=draw.together_s)
                    yield SampleChunk(version, tuple(task.result() for task in done))
            finally:
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)

    async def sample_tokens(self, draw: SampleRequest) -> AsyncIterator[SampleChunk | list[int]]:
        """The one candidate, token by token: lists of new token ids, then the candidate itself."""
        async with self._answering(draw) as version:
            seen = 0
            (index,) = draw.indices
            params = self._parameters(draw, index)
            params.output_kind = type(params.output_kind).CUMULATIVE
            async for output in self._generate(draw.prompt_token_ids, params):
                new = list(output.outputs[0].token_ids[seen:])
                seen += len(new)
                yield new
                last = output
            yield SampleChunk(version, ((index, candidates_of(last)[0]),))

    async def standing(self) -> EngineStatus:
        return EngineStatus(self._version, time.monotonic() - self._began)

    @property
    def _version(self) -> int | None:
        return self._manifest.version if self._manifest is not None else None

    async def check_health(self) -> None:
        if self._failure is not None:
            raise RuntimeError(self._failure)
        await super().check_health()

    @contextlib.asynccontextmanager
    async def _answering(self, draw: SampleRequest) -> AsyncIterator[int | None]:
        async with self._lock.shared():
            if self._failure is not None:
                raise WrongVersion(self._failure)
            if draw.version is not None and draw.version != self._version:
                raise WrongVersion(f"asked for version {draw.version}; this engine holds {self._version}")
            yield self._version

    def _requests(self, draw: SampleRequest) -> list[Coroutine[Any, Any, tuple[int, Candidate]]]:
        parameters = [(index, self._parameters(draw, index)) for index in draw.indices]
        return [self._one(draw, index, params) for index, params in parameters]

    async def _one(self, draw: SampleRequest, index: int, params: Any) -> tuple[int, Candidate]:
        async for output in self._generate(draw.prompt_token_ids, params):
            last = output
        return index, candidates_of(last)[0]

    def _parameters(self, draw: SampleRequest, index: int) -> Any:
        prompt = Prompt(draw.prompt_token_ids, draw.seed + index)
        how = SamplingSpec(1, draw.how.temperature, draw.how.top_p, draw.how.max_tokens)
        with _refused():
            room = response_room(len(draw.prompt_token_ids), self._spec.max_length)
            return request_parameters(prompt, how, min(how.max_tokens, room), self._spec.eos_token_id)

    async def _generate(self, token_ids: Sequence[int], params: Any) -> AsyncIterator[Any]:
        with _refused():
            async for output in self.engine.client.generate(
                {"prompt_token_ids": list(token_ids)}, params, uuid.uuid4().hex
            ):
                yield output

    async def _follow(self, rollout: Any) -> None:
        """Takes each new version when its turn comes; one engine at a time, so that the others answer meanwhile."""
        me = uuid.uuid4().hex
        while True:
            await asyncio.sleep(self._spec.follow_s)
            try:
                present = self._manifest
                manifest = await rollout.turn.remote(me, self._version)
                if manifest is None or present is None:
                    continue
                await rollout.done.remote(me, manifest.version, await self._take(manifest, present))
            except Exception as error:  # the next look may go better; the present version goes on answering
                print(f"following the run failed for now: {error}", flush=True)

    async def _take(self, manifest: VersionManifest, previous: VersionManifest) -> str | None:
        """Loads a version in place; returns why it could not be. Running candidates finish with the old weights.

        Raises TimeoutError, with nothing changed, when they do not in time.
        """
        # From an object store it takes minutes, in which this engine still answers; what fails is tried again.
        await asyncio.to_thread(local_model, manifest.model)
        async with self._lock.exclusive(self._spec.drain_s):
            try:
                await self._load(manifest)
                self._manifest = manifest
            except Exception as error:
                reason = f"version {manifest.version} could not be loaded: {error}"
                try:
                    await self._load(previous)
                except Exception as again:
                    # The weights are in an unknown state: nothing is answered, and Serve replaces this replica.
                    self._failure = f"{reason}; nor could the one before: {again}"
                return reason
        return None

    async def _load(self, manifest: VersionManifest) -> None:
        """Loads and proves."""
        client = self.engine.client
        for call in manifest.calls(self._spec.drain_s):
            await client.collective_rpc(call.method, args=call.args)
        if not await client.reset_prefix_cache():
            raise RuntimeError("the prefix cache could not be reset")
        await self._verify_probes(manifest)

    async def _verify_probes(self, manifest: VersionManifest) -> None:
        """Raises WeightUpdateFailed when the probes score otherwise than they did for the trainer."""
        scores = []
        for probe in manifest.probes:
            sequence = [*probe.prompt_token_ids, *probe.response_token_ids]
            async for output in self._generate(sequence, scoring_parameters()):
                last = output
            scores.append(score_of(last, len(probe.prompt_token_ids)))
        manifest.verify_probes(scores, self._spec.tolerance, f"the engine of {manifest.model}")


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    """What cannot be asked of the engine, as BadRequest."""
    from vllm.exceptions import VLLMClientError, VLLMValidationError

    try:
        yield
    except (NoRoom, VLLMValidationError, VLLMClientError) as error:
        raise BadRequest(str(error)) from error


def _with_model(llm_config: LLMConfig, model: str) -> LLMConfig:
    """A new config: the one given has worked out by now what it would load."""
    given = {name: getattr(llm_config, name) for name in llm_config.model_fields_set}
    loading = {"model_id": llm_config.model_id, "model_source": model}
    return LLMConfig(**given | {"model_loading_config": loading})
