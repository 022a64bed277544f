"""The one door to the judge's endpoint: what is sent again, how long is waited, and what a failure is called.

Invariant: a request is sent at most `attempts` times, each within `timeout_s`, and again only after what may pass: no
connection, no answer in time, 408, 429, 5xx. Everything else ends at once, in one sentence for the user.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Self

from openai import APIConnectionError, APIError, APIStatusError, AsyncOpenAI
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_attempt,
    stop_when_event_set,
    wait_exponential_jitter,
)

from aft_ray.config.run import ConfigError, JudgeConfig
from aft_ray.verify.judge.cache import Reply

_BACKOFF = wait_exponential_jitter(initial=1, max=60, jitter=1)
_LONGEST_WAIT_S = 300.0  # however long an endpoint asks to be left alone


class JudgeFailed(RuntimeError):
    """The judge cannot go on. The message is one sentence for the user; what was rated before is in the cache."""


class RequestRefused(RuntimeError):
    """The endpoint will not answer this one request, however often it is sent; it may answer others."""


class JudgeEndpoint:
    """An OpenAI-compatible endpoint; an asynchronous context manager of one event loop.

    calls, retries: requests for replies sent, and those of them that repeat a failed one.
    """

    def __init__(self, config: JudgeConfig) -> None:
        """Raises ConfigError when the config names no endpoint, or an environment variable that is not set."""
        if not config.url:
            raise ConfigError("feedback.judge.url is not set; it is the base URL of an OpenAI-compatible API")
        # The library would send the key in OPENAI_API_KEY to whatever the URL is, were it given none.
        api_key = os.environ.get(config.api_key_env, "") if config.api_key_env else "none"
        if not api_key:
            raise ConfigError(
                f"the environment variable {config.api_key_env}, which feedback.judge.api_key_env names, is not set; "
                "put the judge's API key there"
            )
        self._config = config
        self._client = AsyncOpenAI(base_url=config.url, api_key=api_key, max_retries=0, timeout=config.timeout_s)
        self.calls = 0
        self.retries = 0
        self._halted = threading.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()

    def halt(self) -> None:
        """From now on no failed request is sent again."""
        self._halted.set()

    async def models(self, attempts: int) -> list[str]:
        """The names of the models there, at least one. Raises JudgeFailed."""

        async def names() -> list[str]:
            async with asyncio.timeout(self._config.timeout_s):
                return [model.id async for model in self._client.models.list()]

        try:
            found: list[str] = await AsyncRetrying(
                retry=retry_if_exception(_passing), wait=_wait, stop=stop_after_attempt(attempts), reraise=True
            )(names)
        except (APIError, TimeoutError, ValueError, AttributeError, TypeError) as error:
            raise self._failed(error, attempts) from error
        if not found:
            raise JudgeFailed(f"the judge at {self._config.url} lists no model; start it with one")
        return found

    async def reply(self, request: Mapping[str, Any]) -> Reply:
        """The answer to a chat completion request. Raises RequestRefused and JudgeFailed."""
        try:
            return await AsyncRetrying(
                retry=retry_if_exception(_passing),
                wait=_wait,
                stop=stop_after_attempt(self._config.attempts) | stop_when_event_set(self._halted),
                before_sleep=self._count_retry,
                reraise=True,
            )(self._send, request)
        except APIStatusError as error:
            if _passing(error) or error.status_code in (401, 403, 404):
                raise self._failed(error, self._config.attempts) from error
            raise RequestRefused(_words(error)) from error
        except (APIError, TimeoutError, ValueError, AttributeError, TypeError) as error:
            raise self._failed(error, self._config.attempts) from error

    async def _send(self, request: Mapping[str, Any]) -> Reply:
        self.calls += 1
        async with asyncio.timeout(self._config.timeout_s):
            completion = await self._client.chat.completions.create(**request)
        usage = completion.usage
        if (
            len(completion.choices) == 0
        ):  # as when a filter stopped the judge; an answer of another kind has none at all
            return Reply("", True, usage.prompt_tokens if usage else 0, 0)
        choice = completion.choices[0]
        return Reply(
            # Half a surrogate pair cannot be stored.
            text=(choice.message.content or "").encode(errors="replace").decode(),
            complete=choice.finish_reason != "length",
            prompt_tokens=usage.prompt_tokens if usage else 0,
            completion_tokens=usage.completion_tokens if usage else 0,
        )

    def _count_retry(self, _: RetryCallState) -> None:
        self.retries += 1

    def _failed(self, error: Exception, attempts: int) -> JudgeFailed:
        where = f"the judge at {self._config.url}"
        kept = "what it rated before is kept"
        if _passing(error):
            what = f"HTTP {error.status_code}" if isinstance(error, APIStatusError) else "no answer"
            times = "once" if attempts == 1 else f"{attempts} times"
            return JudgeFailed(
                f"{where} was asked {times} and failed ({what}: {_words(error)}); see that it runs and that "
                f"feedback.judge.url is right, then start again: {kept}"
            )
        if isinstance(error, APIStatusError):
            if error.status_code in (401, 403):
                way = "put a valid key into an environment variable and name it in feedback.judge.api_key_env"
            else:
                way = "mend feedback.judge.url, which mostly ends in /v1, or feedback.judge.model"
            return JudgeFailed(f"{where} answered HTTP {error.status_code} ({_words(error)}); {way}; {kept}")
        return JudgeFailed(
            f"{where} does not answer as an OpenAI-compatible API does ({type(error).__name__}: {_words(error)}); mend "
            f"feedback.judge.url, which mostly ends in /v1; {kept}"
        )


def _passing(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, APIStatusError):
        return error.status_code in (408, 429) or error.status_code >= 500
    return isinstance(error, APIConnectionError | TimeoutError)


def _wait(state: RetryCallState) -> float:
    """Seconds until the next attempt: growing, with jitter, and not less than the endpoint asked for."""
    assert state.outcome is not None
    asked = _retry_after(state.outcome.exception())
    # Jitter also on what was asked for: all requests were told the same.
    return max(_BACKOFF(state), min(asked, _LONGEST_WAIT_S) + random.uniform(0, 1) if asked else 0)


def _retry_after(error: BaseException | None) -> float:
    """Seconds of the answer's Retry-After header, a number or a date; 0 without one."""
    value = error.response.headers.get("retry-after", "") if isinstance(error, APIStatusError) else ""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
