"""Rates candidates with a judge model behind any OpenAI-compatible endpoint.

Invariants: a reply is in the cache before it is used, so no reply is paid for twice, whatever process is killed. After
a failure no new requests are sent, and the replies to those in flight are still stored. A reply that cannot be parsed
is counted as one without a rating, and too many of these are a failure.
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
from aft_ray.verify.judge.cache import JudgeCache, JudgeCacheFailed, Reply, request_key
from aft_ray.verify.judge.endpoint import JudgeEndpoint, JudgeFailed, RequestRefused
from aft_ray.verify.judge.prompt import judge_prompt, read_reply, reply_pattern

__all__ = ["Judge", "JudgeCounts", "JudgeFailed", "Rating", "RatingRequest"]

# A smaller batch may have as many replies without a rating as a batch of this size. So one unusual candidate does not
# stop a run.
_MIN_BATCH_SIZE = 30


@dataclass(frozen=True, slots=True)
class RatingRequest:
    """One candidate to rate. `key` is its name in messages."""

    key: str
    question: str
    reference: str
    response: str


@dataclass(frozen=True, slots=True)
class Rating:
    """The judge's rating of one candidate.

    Attributes:
        reward: The mean of the ratings in the replies, 1 to 10; None when no reply has a rating.
        evidence: The evidence in each reply that has a rating.
        unparsable: The number of replies without a rating, including requests that the endpoint refused.
    """

    reward: float | None
    evidence: tuple[str, ...]
    unparsable: int


@dataclass(frozen=True, slots=True)
class JudgeCounts:
    """Counts of requests and replies.

    Attributes:
        calls: The requests that were sent, including repeated ones.
        hits: The replies that were in the cache.
        retries: The requests that repeated a failed one.
        unparsable: The replies without a rating, from the cache or new.
        refused: The requests that the endpoint refused, such as one that is longer than its context.
        prompt_tokens: The prompt tokens of new replies.
        completion_tokens: The completion tokens of new replies.
    """

    calls: int = 0
    hits: int = 0
    retries: int = 0
    unparsable: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def line(self) -> str:
        """The counts as one line for the user."""
        problems = {"retried": self.retries, "unparsable": self.unparsable, "refused": self.refused}
        counts = "".join(f", {count} {name}" for name, count in problems.items() if count)
        tokens = self.prompt_tokens + self.completion_tokens
        return (
            f"the judge was asked {self.calls} times ({tokens:,} tokens), {self.hits} ratings were in the cache{counts}"
        )

    def __add__(self, other: JudgeCounts) -> JudgeCounts:
        return JudgeCounts(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


class Judge:
    """Rates candidates with the model that `config` names. Every reply is stored in the SQLite file `cache`.

    Threads may share a judge. One thread rates at a time, so at most `config.concurrency` requests are in flight and no
    request is sent twice.

    Attributes:
        counts: The sums over all calls of this object.
    """

    def __init__(self, config: JudgeConfig, cache: Path) -> None:
        self._config = config
        self._cache = cache
        self._model = config.model
        self._lock = threading.Lock()
        self.counts = JudgeCounts()

    def check(self) -> str:
        """The name of the model that will rate.

        Raises:
            JudgeFailed: The endpoint does not answer the first request.
            ConfigError: The endpoint does not have the configured model, or the config names no endpoint or no key.
        """
        return asyncio.run(self._check())

    def rate(self, requests: Sequence[RatingRequest]) -> list[Rating]:
        """One rating for each request, in order. Equal candidates are rated once. No event loop may run in the thread.

        Raises:
            JudgeFailed: The endpoint cannot be used or does not answer in `attempts` attempts, or more than the share
                `max_unparsable` of the replies have no rating.
        """
        with self._lock:
            return asyncio.run(self._rate(requests)) if requests else []

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

    async def _rate(self, requests: Sequence[RatingRequest]) -> list[Rating]:
        async with JudgeEndpoint(self._config) as endpoint:
            if self._model is None:
                self._model = (await endpoint.models(self._config.attempts))[0]
            chats = [
                [_chat_request(self._config, self._model, request, index) for index in range(self._config.ratings)]
                for request in requests
            ]
            distinct = {chat.key: chat for of_request in chats for chat in of_request}
            try:
                with JudgeCache(self._cache) as cache:
                    batch = _Batch(self._config, endpoint, cache, list(distinct.values()))
                    try:
                        replies = await batch.run()
                    finally:
                        self.counts += batch.counts + JudgeCounts(calls=endpoint.calls, retries=endpoint.retries)
            except JudgeCacheFailed as error:
                raise JudgeFailed(str(error)) from error
        return [_mean_rating([replies[chat.key] for chat in of_request]) for of_request in chats]


@dataclass(frozen=True, slots=True)
class _ChatRequest:
    """One chat completion request for a rating.

    Attributes:
        key: The key of its reply in the cache.
        body: The arguments of the chat completion.
        candidate: The name of the candidate in messages.
    """

    key: str
    body: dict[str, Any]
    candidate: str


def _chat_request(config: JudgeConfig, model: str, request: RatingRequest, index: int) -> _ChatRequest:
    """The chat completion request for the rating number `index`, from 0, of a candidate."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": judge_prompt(request.question, request.reference, request.response)}],
        "temperature": config.temperature,
        "max_tokens": config.max_tokens,
    }
    if config.seed is not None:
        body["seed"] = config.seed + index
    if config.guided:
        body["extra_body"] = {"structured_outputs": {"regex": reply_pattern(config.max_tokens)}}
    return _ChatRequest(request_key(body, index), body, request.key)


class _Batch:
    """Sends distinct requests, at most `config.concurrency` at a time, until none is left or one has failed."""

    def __init__(
        self, config: JudgeConfig, endpoint: JudgeEndpoint, cache: JudgeCache, requests: Sequence[_ChatRequest]
    ) -> None:
        self._config = config
        self._endpoint = endpoint
        self._cache = cache
        self._waiting = deque(requests)
        self._max_without_rating = config.max_unparsable * max(_MIN_BATCH_SIZE, len(requests))
        self._replies: dict[str, Reply] = {}
        self._failure: JudgeFailed | None = None
        self.counts = JudgeCounts()

    async def run(self) -> dict[str, Reply]:
        """The replies by the keys of their requests; empty replies to refused requests. Raises JudgeFailed."""
        await asyncio.gather(*(self._send_waiting() for _ in range(min(self._config.concurrency, len(self._waiting)))))
        if self._failure:
            raise self._failure
        return self._replies

    async def _send_waiting(self) -> None:
        while self._waiting and self._failure is None:
            request = self._waiting.popleft()
            try:
                self._replies[request.key] = await self._reply(request)
            except JudgeFailed as error:
                self._failure = self._failure or error
                self._endpoint.stop_retries()

    async def _reply(self, request: _ChatRequest) -> Reply:
        if reply := self._cache.get(request.key):
            self.counts += JudgeCounts(hits=1)
        else:
            try:
                reply = self._cache.put(request.key, await self._endpoint.reply(request.body))
            except RequestRefused as error:
                self.counts += JudgeCounts(refused=1)
                self._check_without_rating(f"the request for {request.candidate} was refused: {error}")
                return Reply("", True, 0, 0)
            self.counts += JudgeCounts(prompt_tokens=reply.prompt_tokens, completion_tokens=reply.completion_tokens)
        if read_reply(reply.text, reply.complete) is None:
            self.counts += JudgeCounts(unparsable=1)
            self._check_without_rating(f"the last reply, for {request.candidate}, ends in {reply.text[-100:]!r}")
        return reply

    def _check_without_rating(self, example: str) -> None:
        """Raises JudgeFailed, with the last reply as an example, when too many replies have no rating."""
        without_rating = self.counts.unparsable + self.counts.refused
        if without_rating > self._max_without_rating:
            raise JudgeFailed(
                f"{without_rating} of the first {len(self._replies) + 1} replies of the judge at {self._config.url} "
                f"have no rating, more than feedback.judge.max_unparsable={self._config.max_unparsable} allows "
                f"({example}); "
                "take another judge, raise feedback.judge.max_tokens, or set feedback.judge.guided=true if the "
                "endpoint supports guided decoding; earlier ratings are kept"
            )


def _mean_rating(replies: Sequence[Reply]) -> Rating:
    """The rating of a candidate from the replies about it."""
    parsed_replies = [parsed for reply in replies if (parsed := read_reply(reply.text, reply.complete))]
    return Rating(
        reward=fmean(parsed.rating for parsed in parsed_replies) if parsed_replies else None,
        evidence=tuple(parsed.evidence for parsed in parsed_replies),
        unparsable=len(replies) - len(parsed_replies),
    )
