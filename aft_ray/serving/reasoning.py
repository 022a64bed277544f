"""Samples the candidates of a question in waves, ranks them, and stops when more candidates cannot change the answer.

Invariant: all candidates of a result come from one policy version, and a candidate's score is the engine's
log-probability of the very tokens that it sampled, as in training and evaluation. If an engine fails, the candidates
that are missing are sampled by another engine with the same seeds.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from aft_ray.config.serve import Strategy
from aft_ray.inference.request_parameters import SamplingSpec
from aft_ray.inference.versioned_engine import WrongVersion
from aft_ray.serving.engine.client import BadRequest
from aft_ray.serving.engine.server import EngineStatus, SampleChunk, SampleRequest
from aft_ray.serving.strategies import Ranking, Vote, leader_probability, next_wave_size, rank
from aft_ray.storage.records import Candidate
from aft_ray.tasks import Task
from aft_ray.verify.answers.canonical import normalise

# How often sampling is attempted if engines fail or change their version, and the seconds before each new attempt.
_ATTEMPTS = 4
_RETRY_DELAY_S = 0.5
# Seconds for which an engine collects finished candidates before it sends them, since each transfer costs two processes
# about a millisecond: short when a client watches the candidates arrive, longer when none does.
_STREAM_FLUSH_INTERVAL_S = 0.03
FLUSH_INTERVAL_S = 0.3
# Deadline for an engine to report its status.
_STATUS_TIMEOUT_S = 3.0


class EngineUnavailable(RuntimeError):
    """No engine could answer."""

    def __init__(self) -> None:
        super().__init__("no engine answers; the service is starting or restarting one")


class DeadlineExceeded(RuntimeError):
    """The deadline passed before the first candidate was finished."""


@dataclass(frozen=True, slots=True)
class ReasoningRequest:
    """A tokenized question and how to answer it.

    Attributes:
        n: most candidates to sample.
        sampling: how they are sampled. Its k is not used.
        seed: the seed of the candidate with index 0; the candidate with index i has seed + i.
        stop_confidence: sampling stops when the leading answer wins with this probability.
        min_candidates: number of candidates that are sampled however certain the winner is.
    """

    prompt_token_ids: list[int]
    task: Task
    strategy: Strategy
    n: int
    sampling: SamplingSpec
    seed: int
    stop_confidence: float
    min_candidates: int = 1


@dataclass(frozen=True, slots=True)
class ScoredCandidate:
    """A candidate with its text and extracted answer.

    Attributes:
        key: canonical form of the answer, equal for equal answers; None if the response gives no answer.
        score: mean log-probability of its tokens, end-of-sequence included, nats per token.
        tokens: number of tokens of the response.
    """

    index: int
    text: str
    answer: str | None
    key: str | None
    score: float
    tokens: int
    finish_reason: str

    @property
    def vote(self) -> Vote:
        return Vote(self.index, self.score, self.key)


StopReason = Literal["complete", "certain", "confident", "deadline"]


@dataclass(frozen=True, slots=True)
class ReasoningResult:
    """The ranked candidates of a question.

    Attributes:
        candidates: best first.
        version: the policy version that sampled all of them; None for a model that is not from a run.
        stopped: why sampling stopped.
        tokens_saved: tokens of the candidates that were not sampled, estimated by the mean length of the others.
        sampling_s: seconds from the start of sampling to the ranking.
    """

    ranking: Ranking
    candidates: tuple[ScoredCandidate, ...]
    version: int | None
    stopped: StopReason
    tokens_saved: int
    sampling_s: float

    @property
    def winner(self) -> ScoredCandidate:
        return self.candidates[0]

    @property
    def tokens(self) -> int:
        return sum(candidate.tokens for candidate in self.candidates)


@dataclass(slots=True)
class _SamplingState:
    """What has been sampled of a question so far.

    Attributes:
        candidates: the finished candidates by index.
        version: the policy version that sampled them; None before the first.
        requested: number of candidates requested in all waves, the present one included.
    """

    candidates: dict[int, ScoredCandidate] = field(default_factory=dict)
    version: int | None = None
    requested: int = 0

    def votes(self) -> list[Vote]:
        return [candidate.vote for candidate in self.candidates.values()]

    def missing(self) -> tuple[int, ...]:
        return tuple(index for index in range(self.requested) if index not in self.candidates)

    def discard_candidates(self) -> None:
        self.candidates.clear()
        self.version = None


class ReasoningPipeline:
    """Answers questions with candidates that the engines sample.

    Args:
        engines: Serve handle of the deployment of policy servers.
        text_of: the text of a response without its end token; `Renderer.text` of the policy.
    """

    def __init__(self, engines: Any, text_of: Callable[[Sequence[int]], str]) -> None:
        self._engines = engines
        # Made once, since every handle keeps a connection to Serve's controller.
        self._streaming_engines = engines.options(stream=True)
        self._text_of = text_of

    async def reason(
        self,
        request: ReasoningRequest,
        deadline_s: float,
        on_candidate: Callable[[ScoredCandidate], None] | None = None,
    ) -> ReasoningResult:
        """Returns the ranking of the candidates that are finished within `deadline_s` seconds.

        Args:
            request: the question.
            deadline_s: seconds for all of the sampling.
            on_candidate: called with each candidate as it is finished. A candidate replaces an earlier one of the same
                index.

        Raises:
            BadRequest: the engine rejects the request.
            EngineUnavailable: no engine answers.
            DeadlineExceeded: no candidate was finished in time.
        """
        started = time.monotonic()
        state = _SamplingState()
        stopped: StopReason
        try:
            async with asyncio.timeout(deadline_s):
                stopped = await self._sample(request, state, on_candidate)
        except TimeoutError:
            if not state.candidates:
                message = f"no candidate was finished within {deadline_s:.0f} s"
                raise await self._timeout_error(started, message) from None
            stopped = "deadline"
        ranking = rank(request.strategy, state.votes())
        ordered = tuple(state.candidates[vote.index] for vote in ranking.order)
        mean_tokens = sum(candidate.tokens for candidate in ordered) / len(ordered)
        return ReasoningResult(
            ranking=ranking,
            candidates=ordered,
            version=state.version,
            stopped=stopped,
            tokens_saved=round(mean_tokens * (request.n - state.requested)),
            sampling_s=time.monotonic() - started,
        )

    async def stream(self, request: ReasoningRequest, deadline_s: float) -> AsyncGenerator[str | ReasoningResult, None]:
        """Yields the text of a single response as it is generated, then the result.

        Nothing is retried, since text that has been sent cannot be withdrawn. Raises the same errors as `reason`.
        """
        started = time.monotonic()
        detokenizer = _IncrementalDetokenizer(self._text_of)
        sample = SampleRequest(request.prompt_token_ids, request.sampling, (0,), request.seed)
        try:
            async with asyncio.timeout(deadline_s):
                async with contextlib.aclosing(self._call("sample_tokens", sample)) as parts:
                    async for part in parts:
                        if isinstance(part, list):
                            if text := detokenizer.add(part):
                                yield text
                            continue
                        ((index, candidate),) = part.candidates
                        scored = self._scored(request, index, candidate)
                        if rest := detokenizer.advance_to(scored.text):
                            yield rest
                        yield ReasoningResult(
                            rank(request.strategy, [scored.vote]),
                            (scored,),
                            part.version,
                            "complete",
                            0,
                            time.monotonic() - started,
                        )
        except TimeoutError:
            message = f"the response was not finished within {deadline_s:.0f} s"
            raise await self._timeout_error(started, message) from None
        except (RayError, RayServeException) as error:
            raise _engine_error(error) from error

    async def version(self) -> int | None:
        """Returns the policy version of an engine. Raises EngineUnavailable if none answers within a few seconds."""
        return (await self._engine_status()).version

    async def _engine_status(self) -> EngineStatus:
        try:
            return await asyncio.wait_for(self._engines.engine_status.remote(), _STATUS_TIMEOUT_S)  # type: ignore[no-any-return]
        except (RayError, RayServeException, TimeoutError) as error:
            raise EngineUnavailable from error

    async def _timeout_error(self, started: float, message: str) -> Exception:
        """Returns DeadlineExceeded if an engine was available since `started`, otherwise EngineUnavailable."""
        try:
            status = await self._engine_status()
        except EngineUnavailable as error:
            return error
        return DeadlineExceeded(message) if status.seconds > time.monotonic() - started else EngineUnavailable()

    async def _sample(
        self,
        request: ReasoningRequest,
        state: _SamplingState,
        on_candidate: Callable[[ScoredCandidate], None] | None,
    ) -> StopReason:
        """Samples waves into `state` until all n candidates are there or the winner is certain or probable enough."""
        failures = 0
        while True:
            if not state.missing():
                remaining = request.n - len(state.candidates)
                if remaining == 0:
                    return "complete"
                probability = leader_probability(request.strategy, state.votes(), remaining)
                if len(state.candidates) >= request.min_candidates and probability >= request.stop_confidence:
                    return "certain" if probability == 1 else "confident"
                wave = next_wave_size(request.strategy, state.votes(), request.n, request.stop_confidence)
                state.requested = max(state.requested + wave, request.min_candidates)
            flush_interval_s = _STREAM_FLUSH_INTERVAL_S if on_candidate else FLUSH_INTERVAL_S
            sample = SampleRequest(
                request.prompt_token_ids,
                request.sampling,
                state.missing(),
                request.seed,
                flush_interval_s,
                state.version,
            )
            try:
                async with contextlib.aclosing(self._call("sample", sample)) as chunks:
                    async for chunk in chunks:
                        self._add_chunk(request, state, chunk, on_candidate)
                        remaining = request.n - len(state.candidates)
                        enough = len(state.candidates) >= request.min_candidates
                        if remaining and enough and leader_probability(request.strategy, state.votes(), remaining) == 1:
                            return "certain"
            except (RayError, RayServeException) as error:
                cause = _engine_error(error)
                failures += 1
                if isinstance(cause, BadRequest) or failures == _ATTEMPTS:
                    raise cause from error
                if isinstance(cause, WrongVersion):
                    state.discard_candidates()
                else:
                    await asyncio.sleep(_RETRY_DELAY_S)

    def _add_chunk(
        self,
        request: ReasoningRequest,
        state: _SamplingState,
        chunk: SampleChunk,
        on_candidate: Callable[[ScoredCandidate], None] | None,
    ) -> None:
        state.version = chunk.version
        for index, candidate in chunk.candidates:
            scored = self._scored(request, index, candidate)
            state.candidates[index] = scored
            if on_candidate:
                on_candidate(scored)

    def _scored(self, request: ReasoningRequest, index: int, candidate: Candidate) -> ScoredCandidate:
        text = self._text_of(candidate.token_ids)
        answer = request.task.extract(text)
        return ScoredCandidate(
            index=index,
            text=text,
            answer=answer,
            key=None if answer is None else normalise(answer),
            score=candidate.score,
            tokens=len(candidate.token_ids),
            finish_reason=candidate.finish_reason,
        )

    async def _call(self, method: str, sample: SampleRequest) -> AsyncGenerator[Any, None]:
        """Yields the parts of a streamed call. Closing the generator before its end also stops the engine's work."""
        responses = getattr(self._streaming_engines, method).remote(sample)
        finished = False
        try:
            async for part in responses:
                yield part
            finished = True
        finally:
            if not finished:
                responses.cancel()


def _engine_error(error: Exception) -> Exception:
    """Returns the BadRequest or WrongVersion that Ray has wrapped, otherwise EngineUnavailable."""
    if isinstance(error, BadRequest | WrongVersion):
        cause = getattr(error, "cause", error)
        return type(cause)(*cause.args) if isinstance(cause, BadRequest | WrongVersion) else error
    return EngineUnavailable()


class _IncrementalDetokenizer:
    """Decodes tokens as they arrive. Invariant: a character is returned only when all of its tokens are there."""

    def __init__(self, text_of: Callable[[Sequence[int]], str]) -> None:
        self._text_of = text_of
        self._tokens: list[int] = []
        self._text = ""

    def add(self, tokens: Sequence[int]) -> str:
        """Returns the text that the tokens add; empty if it is not known before more tokens arrive."""
        self._tokens += tokens
        text = self._text_of(self._tokens)
        # An incomplete character decodes to U+FFFD, and an incomplete word may change the text before it.
        if text.endswith("\ufffd") or not text.startswith(self._text):
            return ""
        return self.advance_to(text)

    def advance_to(self, text: str) -> str:
        """Returns what the whole text `text` adds to the text returned so far."""
        added = text[len(self._text) :]
        self._text = text
        return added
