"""From a question to its answer: sample in waves, score, rank, stop when more cannot matter.

Invariant: all candidates of an answer come from one policy version; a candidate's score is the engine's log-prob of the
very tokens it sampled, as in training and evaluation. An engine that fails costs time, not the question: the missing
candidates are asked of another, with the same seeds.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from aft_ray.config.serve import Strategy
from aft_ray.inference.engine import SamplingSpec
from aft_ray.serving.engine.server import BadRequest, EngineStatus, SampleChunk, SampleRequest, WrongVersion
from aft_ray.serving.strategies import Ranking, Vote, certainty, next_wave, rank
from aft_ray.storage.records import Candidate
from aft_ray.tasks import Task
from aft_ray.verify.answers.canonical import normalise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Times a question is asked again after an engine failed or changed its version, and seconds before each.
_ATTEMPTS = 4
_RETRY_S = 0.5
# Seconds that finished candidates wait for others, so that they travel together, when a client watches them come and
# when none does; each journey costs a millisecond of two processes.
_WATCHED_S = 0.03
UNWATCHED_S = 0.3
# Seconds within which an engine that is there says what version it has.
_ANSWERS_S = 3.0


class EngineUnavailable(RuntimeError):
    """No engine could answer."""

    def __init__(self) -> None:
        super().__init__("no engine answers; the service is starting or restarting one")


class TooLate(RuntimeError):
    """The deadline came before the first candidate."""


@dataclass(frozen=True, slots=True)
class ReasoningRequest:
    """A question as the engines see it, and how to answer it. how: its k is not read.

    at_least: candidates that are wanted however sure the winner is.
    """

    prompt_token_ids: list[int]
    task: Task
    strategy: Strategy
    n: int
    how: SamplingSpec
    seed: int
    stop_confidence: float
    at_least: int = 1


@dataclass(frozen=True, slots=True)
class Scored:
    """A candidate read and scored. score: mean log-prob of its tokens, end-of-sequence included, nats per token."""

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


Stopped = Literal["complete", "certain", "confident", "deadline"]


@dataclass(frozen=True, slots=True)
class Reasoned:
    """The answer to a question.

    candidates: best first. tokens_saved: of the candidates that were never begun, by the mean length of the others.
    """

    ranking: Ranking
    candidates: tuple[Scored, ...]
    version: int | None
    stopped: Stopped
    tokens_saved: int
    sampling_s: float

    @property
    def winner(self) -> Scored:
        return self.candidates[0]

    @property
    def tokens(self) -> int:
        return sum(candidate.tokens for candidate in self.candidates)


@dataclass(slots=True)
class _Progress:
    """What is there of an answer while it is worked out. goal: candidates after the present wave."""

    candidates: dict[int, Scored] = field(default_factory=dict)
    version: int | None = None
    goal: int = 0

    def votes(self) -> list[Vote]:
        return [candidate.vote for candidate in self.candidates.values()]

    def missing(self) -> tuple[int, ...]:
        return tuple(index for index in range(self.goal) if index not in self.candidates)

    def forget(self) -> None:
        self.candidates.clear()
        self.version = None


class Reasoning:
    """Asks the engines behind a deployment handle. `tokenizer` is the policy's."""

    def __init__(self, engines: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self._engines = engines
        # Made once: every handle keeps a connection to Serve's controller.
        self._streaming = engines.options(stream=True)
        self._tokenizer = tokenizer

    async def reason(
        self, ask: ReasoningRequest, deadline_s: float, on_candidate: Callable[[Scored], None] | None = None
    ) -> Reasoned:
        """Answers within `deadline_s`, with the candidates finished by then. `on_candidate` sees each as it comes; one
        with an index seen before replaces that.

        Raises BadRequest, EngineUnavailable, or TooLate.
        """
        started = time.monotonic()
        progress = _Progress()
        stopped: Stopped
        try:
            async with asyncio.timeout(deadline_s):
                stopped = await self._sample(ask, progress, on_candidate)
        except TimeoutError:
            if not progress.candidates:
                raise await self._late(started, f"no candidate was finished within {deadline_s:.0f} s") from None
            stopped = "deadline"
        ranking = rank(ask.strategy, progress.votes())
        ordered = tuple(progress.candidates[vote.index] for vote in ranking.order)
        typical = sum(candidate.tokens for candidate in ordered) / len(ordered)
        return Reasoned(
            ranking=ranking,
            candidates=ordered,
            version=progress.version,
            stopped=stopped,
            tokens_saved=round(typical * (ask.n - progress.goal)),
            sampling_s=time.monotonic() - started,
        )

    async def stream(self, ask: ReasoningRequest, deadline_s: float) -> AsyncGenerator[str | Reasoned, None]:
        """The text of a single response as it is generated, then the whole. Nothing is asked again once text is out."""
        started = time.monotonic()
        spoken = _Spoken(self._tokenizer)
        draw = SampleRequest(ask.prompt_token_ids, ask.how, (0,), ask.seed)
        try:
            async with asyncio.timeout(deadline_s):
                async with contextlib.aclosing(self._call("sample_tokens", draw)) as parts:
                    async for part in parts:
                        if isinstance(part, list):
                            if text := spoken.add(part):
                                yield text
                            continue
                        ((index, candidate),) = part.candidates
                        scored = self._scored(ask, index, candidate)
                        if rest := spoken.rest(scored.text):
                            yield rest
                        yield Reasoned(
                            rank(ask.strategy, [scored.vote]),
                            (scored,),
                            part.version,
                            "complete",
                            0,
                            time.monotonic() - started,
                        )
        except TimeoutError:
            raise await self._late(started, f"the response was not finished within {deadline_s:.0f} s") from None
        except (RayError, RayServeException) as error:
            raise _meant(error) from error

    async def version(self) -> int | None:
        """Policy version of an engine. Raises EngineUnavailable when none answers at once."""
        return (await self._standing()).version

    async def _standing(self) -> EngineStatus:
        try:
            return await asyncio.wait_for(self._engines.standing.remote(), _ANSWERS_S)  # type: ignore[no-any-return]
        except (RayError, RayServeException, TimeoutError) as error:
            raise EngineUnavailable from error

    async def _late(self, started: float, why: str) -> Exception:
        """What a passed deadline means: with no engine there all the time, it was not the question."""
        try:
            standing = await self._standing()
        except EngineUnavailable as error:
            return error
        return TooLate(why) if standing.seconds > time.monotonic() - started else EngineUnavailable()

    async def _sample(
        self, ask: ReasoningRequest, progress: _Progress, on_candidate: Callable[[Scored], None] | None
    ) -> Stopped:
        failures = 0
        while True:
            if not progress.missing():
                remaining = ask.n - len(progress.candidates)
                if remaining == 0:
                    return "complete"
                sure = certainty(ask.strategy, progress.votes(), remaining)
                if len(progress.candidates) >= ask.at_least and sure >= ask.stop_confidence:
                    return "certain" if sure == 1 else "confident"
                wave = next_wave(ask.strategy, progress.votes(), ask.n, ask.stop_confidence)
                progress.goal = max(progress.goal + wave, ask.at_least)
            together_s = _WATCHED_S if on_candidate else UNWATCHED_S
            draw = SampleRequest(
                ask.prompt_token_ids, ask.how, progress.missing(), ask.seed, together_s, progress.version
            )
            try:
                async with contextlib.aclosing(self._call("sample", draw)) as drawn:
                    async for some in drawn:
                        self._take(ask, progress, some, on_candidate)
                        remaining = ask.n - len(progress.candidates)
                        enough = len(progress.candidates) >= ask.at_least
                        if remaining and enough and certainty(ask.strategy, progress.votes(), remaining) == 1:
                            return "certain"
            except (RayError, RayServeException) as error:
                meant = _meant(error)
                failures += 1
                if isinstance(meant, BadRequest) or failures == _ATTEMPTS:
                    raise meant from error
                if isinstance(meant, WrongVersion):
                    progress.forget()
                else:
                    await asyncio.sleep(_RETRY_S)

    def _take(
        self,
        ask: ReasoningRequest,
        progress: _Progress,
        drawn: SampleChunk,
        on_candidate: Callable[[Scored], None] | None,
    ) -> None:
        progress.version = drawn.version
        for index, candidate in drawn.candidates:
            scored = self._scored(ask, index, candidate)
            progress.candidates[index] = scored
            if on_candidate:
                on_candidate(scored)

    def _scored(self, ask: ReasoningRequest, index: int, candidate: Candidate) -> Scored:
        text = self._tokenizer.decode(candidate.token_ids, skip_special_tokens=True)
        answer = ask.task.extract(text)
        return Scored(
            index=index,
            text=text,
            answer=answer,
            key=None if answer is None else normalise(answer),
            score=candidate.score,
            tokens=len(candidate.token_ids),
            finish_reason=candidate.finish_reason,
        )

    async def _call(self, method: str, draw: SampleRequest) -> AsyncGenerator[Any, None]:
        """The parts of a streamed call. Closing it before its end cancels the call, and so what the engine runs."""
        responses = getattr(self._streaming, method).remote(draw)
        finished = False
        try:
            async for part in responses:
                yield part
            finished = True
        finally:
            if not finished:
                responses.cancel()


def _meant(error: Exception) -> Exception:
    """Our own error inside Ray's, or that no engine answered."""
    if isinstance(error, BadRequest | WrongVersion):
        cause = getattr(error, "cause", error)
        return type(cause)(*cause.args) if isinstance(cause, BadRequest | WrongVersion) else error
    return EngineUnavailable()


class _Spoken:
    """Text from tokens, piece by piece, no character before it is whole."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._said = ""

    def add(self, tokens: Sequence[int]) -> str:
        self._tokens += tokens
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        # An unfinished character is decoded to U+FFFD, and a change of what was said means more is to come.
        if text.endswith("\ufffd") or not text.startswith(self._said):
            return ""
        return self.rest(text)

    def rest(self, text: str) -> str:
        new = text[len(self._said) :]
        self._said = text
        return new
