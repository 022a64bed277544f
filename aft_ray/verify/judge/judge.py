"""Ratings of candidates by a judge model behind any OpenAI-compatible endpoint.

Invariants: a reply is in the cache before it counts, so nothing is paid for twice, whatever is killed. A failure stops
new requests and lets those in flight come home into the cache. A rating that cannot be read is no rating; it is
counted, and too many of them are a failure.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from aft_ray.config.run import ConfigError, JudgeConfig
from aft_ray.verify.judge.cache import CacheBroken, JudgeCache, Reply, request_key
from aft_ray.verify.judge.endpoint import JudgeEndpoint, JudgeFailed, RequestRefused
from aft_ray.verify.judge.prompt import judge_prompt, read_reply, reply_pattern

__all__ = ["Judge", "JudgeCounts", "JudgeFailed", "Rating", "RatingRequest"]

# A batch of fewer replies is allowed as many without a rating as one of this size: an odd candidate is no broken judge.
_FEW = 30


@dataclass(frozen=True, slots=True)
class RatingRequest:
    """One candidate to rate. `key` names it in messages."""

    key: str
    question: str
    reference: str
    response: str


@dataclass(frozen=True, slots=True)
class Rating:
    """What the judge said of one item.

    reward: mean of the ratings that could be read, 1 to 10; None when none could.
    evidence: what the judge found, one text for each rating that could be read.
    unparsable: replies without a rating, requests that the endpoint refused included.
    """

    reward: float | None
    evidence: tuple[str, ...]
    unparsable: int


@dataclass(frozen=True, slots=True)
class JudgeCounts:
    """What rating took. calls: requests sent, repeated ones included; retries: those that repeat a failed one.

    hits: ratings that were in the cache. unparsable: replies without a rating, from the cache or new. refused: requests
    that the endpoint will not answer, such as one longer than its context. Tokens are those of new replies.
    """

    calls: int = 0
    hits: int = 0
    retries: int = 0
    unparsable: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def line(self) -> str:
        """What is worth telling a person."""
        odd = {"retried": self.retries, "unparsable": self.unparsable, "refused": self.refused}
        told = "".join(f", {count} {name}" for name, count in odd.items() if count)
        tokens = self.prompt_tokens + self.completion_tokens
        return f"the judge was asked {self.calls} times ({tokens:,} tokens), {self.hits} ratings were known{told}"

    def __add__(self, other: JudgeCounts) -> JudgeCounts:
        return JudgeCounts(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


class Judge:
    """Rates candidates as `config` says, keeping every reply in the SQLite file `cache`.

    `counts` adds up over the calls of this object. Threads may share it: one rates at a time, so that no more than
    `config.concurrency` requests are in flight and no request is sent twice at once.
    """

    def __init__(self, config: JudgeConfig, cache: Path) -> None:
        self._config = config
        self._cache = cache
        self._model = config.model
        self._rating = threading.Lock()
        self.counts = JudgeCounts()

    def check(self) -> str:
        """The model that will be asked. Raises JudgeFailed, at once, when the endpoint does not answer, and ConfigError
        when it has no such model or the config names no endpoint or no key."""
        return asyncio.run(self._check())

    def rate(self, items: Sequence[RatingRequest]) -> list[Rating]:
        """One rating for each item, in order; equal items are asked about once. Not from within an event loop.

        Raises JudgeFailed when the endpoint cannot be used or does not answer in `attempts`, and when more than
        `max_unparsable` of the replies have no rating.
        """
        with self._rating:
            return asyncio.run(self._rate(items)) if items else []

    async def _check(self) -> str:
        async with JudgeEndpoint(self._config) as endpoint:
            models = await endpoint.models(attempts=1)
        if self._config.model in models:
            return self._config.model
        if self._config.model is None:
            return models[0]
        raise ConfigError(
            f"the judge at {self._config.url} has no model {self._config.model}; set feedback.judge.model to one that "
            f"it has: {', '.join(models[:20])}"
        )

    async def _rate(self, items: Sequence[RatingRequest]) -> list[Rating]:
        async with JudgeEndpoint(self._config) as endpoint:
            if self._model is None:
                self._model = (await endpoint.models(self._config.attempts))[0]
            asks = [[_ask(self._config, self._model, item, i) for i in range(self._config.ratings)] for item in items]
            distinct = {ask.key: ask for row in asks for ask in row}
            try:
                with JudgeCache(self._cache) as cache:
                    batch = _Batch(self._config, endpoint, cache, list(distinct.values()))
                    try:
                        replies = await batch.run()
                    finally:
                        self.counts += batch.counts + JudgeCounts(calls=endpoint.calls, retries=endpoint.retries)
            except CacheBroken as error:
                raise JudgeFailed(str(error)) from error
        return [_rating([replies[ask.key] for ask in row]) for row in asks]


@dataclass(frozen=True, slots=True)
class _ChatRequest:
    """One rating to get. key: of its reply in the cache; item: the candidate's name in messages."""

    key: str
    request: dict[str, Any]
    item: str


def _ask(config: JudgeConfig, model: str, item: RatingRequest, index: int) -> _ChatRequest:
    request: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": judge_prompt(item.question, item.reference, item.response)}],
        "temperature": config.temperature,
        "max_tokens": config.max_tokens,
    }
    if config.seed is not None:
        request["seed"] = config.seed + index
    if config.guided:
        request["extra_body"] = {"structured_outputs": {"regex": reply_pattern(config.max_tokens)}}
    return _ChatRequest(request_key(request, index), request, item.key)


class _Batch:
    """Distinct requests, worked off by as many workers as may be in flight, until none is left or one has failed."""

    def __init__(
        self, config: JudgeConfig, endpoint: JudgeEndpoint, cache: JudgeCache, asks: Sequence[_ChatRequest]
    ) -> None:
        self._config = config
        self._endpoint = endpoint
        self._cache = cache
        self._waiting = deque(asks)
        self._tolerated = config.max_unparsable * max(_FEW, len(asks))
        self._replies: dict[str, Reply] = {}
        self._failure: JudgeFailed | None = None
        self.counts = JudgeCounts()

    async def run(self) -> dict[str, Reply]:
        """The reply to each request, by its key; an empty one where the endpoint refused. Raises JudgeFailed."""
        await asyncio.gather(*(self._work() for _ in range(min(self._config.concurrency, len(self._waiting)))))
        if self._failure:
            raise self._failure
        return self._replies

    async def _work(self) -> None:
        while self._waiting and self._failure is None:
            ask = self._waiting.popleft()
            try:
                self._replies[ask.key] = await self._reply(ask)
            except JudgeFailed as error:
                self._failure = self._failure or error
                self._endpoint.halt()

    async def _reply(self, ask: _ChatRequest) -> Reply:
        if reply := self._cache.get(ask.key):
            self.counts += JudgeCounts(hits=1)
        else:
            try:
                reply = self._cache.put(ask.key, await self._endpoint.reply(ask.request))
            except RequestRefused as error:
                self.counts += JudgeCounts(refused=1)
                self._tolerate(f"the request for {ask.item} was refused: {error}")
                return Reply("", True, 0, 0)
            self.counts += JudgeCounts(prompt_tokens=reply.prompt_tokens, completion_tokens=reply.completion_tokens)
        if read_reply(reply.text, reply.complete) is None:
            self.counts += JudgeCounts(unparsable=1)
            self._tolerate(f"the last one, for {ask.item}, ends in {reply.text[-100:]!r}")
        return reply

    def _tolerate(self, example: str) -> None:
        """One more reply is without a rating. Raises JudgeFailed when these are too many."""
        without = self.counts.unparsable + self.counts.refused
        if without > self._tolerated:
            raise JudgeFailed(
                f"{without} of the first {len(self._replies) + 1} replies of the judge at {self._config.url} have no "
                f"rating, more than feedback.judge.max_unparsable={self._config.max_unparsable} allows ({example}); "
                "take another judge, raise feedback.judge.max_tokens, or set feedback.judge.guided=true where the "
                "endpoint can hold a model to a form; what it rated before is kept"
            )


def _rating(replies: Sequence[Reply]) -> Rating:
    read = [parsed for reply in replies if (parsed := read_reply(reply.text, reply.complete))]
    return Rating(
        reward=fmean(parsed.rating for parsed in read) if read else None,
        evidence=tuple(parsed.evidence for parsed in read),
        unparsable=len(replies) - len(read),
    )
