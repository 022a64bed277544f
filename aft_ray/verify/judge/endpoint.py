"""Sends requests to the judge's endpoint, repeats those that failed, and turns errors into sentences for the user.

Invariant: a request is sent at most `attempts` times, each with the time limit `timeout_s`. It is repeated only after
an error that may be transient: no connection, no answer in time, or HTTP status 408, 429 or 5xx. After any other error
the judge fails at once, with one sentence for the user, or the request is refused.
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
_MAX_RETRY_AFTER_S = 300.0  # A longer Retry-After header is cut to this time.


class JudgeFailed(RuntimeError):
    """The judge cannot be used. The message is one sentence for the user. Earlier replies are in the cache."""


class RequestRefused(RuntimeError):
    """The endpoint rejects this request, and would reject it again. It may answer other requests."""


class JudgeEndpoint:
    """An OpenAI-compatible endpoint: an asynchronous context manager for one event loop.

    Attributes:
        calls: The number of chat completion requests that were sent.
        retries: The number of those that repeated a failed request.
    """

    def __init__(self, config: JudgeConfig) -> None:
        """Raises ConfigError when the config names no endpoint, or names an environment variable that is not set."""
        if not config.url:
            raise ConfigError("feedback.judge.url is not set; it is the base URL of an OpenAI-compatible API")
        # Without a key, the library would send the one in OPENAI_API_KEY to the URL, whatever that is.
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
        self._retries_stopped = threading.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()

    def stop_retries(self) -> None:
        """From now on, failed requests are not sent again."""
        self._retries_stopped.set()

    async def models(self, attempts: int) -> list[str]:
        """The names of the endpoint's models, at least one. Raises JudgeFailed."""

        async def names() -> list[str]:
            async with asyncio.timeout(self._config.timeout_s):
                return [model.id async for model in self._client.models.list()]

        try:
            found: list[str] = await AsyncRetrying(
                retry=retry_if_exception(_is_transient), wait=_wait_s, stop=stop_after_attempt(attempts), reraise=True
            )(names)
        except (APIError, TimeoutError, ValueError, AttributeError, TypeError) as error:
            raise self._failed(error, attempts) from error
        if not found:
            raise JudgeFailed(f"the judge at {self._config.url} lists no model; start it with one")
        return found

    async def reply(self, request: Mapping[str, Any]) -> Reply:
        """The reply to a chat completion request. Raises RequestRefused or JudgeFailed."""
        try:
            return await AsyncRetrying(
                retry=retry_if_exception(_is_transient),
                wait=_wait_s,
                stop=stop_after_attempt(self._config.attempts) | stop_when_event_set(self._retries_stopped),
                before_sleep=self._count_retry,
                reraise=True,
            )(self._send, request)
        except APIStatusError as error:
            if _is_transient(error) or error.status_code in (401, 403, 404):
                raise self._failed(error, self._config.attempts) from error
            raise RequestRefused(_one_line(error)) from error
        except (APIError, TimeoutError, ValueError, AttributeError, TypeError) as error:
            raise self._failed(error, self._config.attempts) from error

    async def _send(self, request: Mapping[str, Any]) -> Reply:
        self.calls += 1
        async with asyncio.timeout(self._config.timeout_s):
            completion = await self._client.chat.completions.create(**request)
        usage = completion.usage
        # A filter may leave no choice. `len` raises TypeError when the answer is no chat completion and has none.
        if len(completion.choices) == 0:
            return Reply("", True, usage.prompt_tokens if usage else 0, 0)
        choice = completion.choices[0]
        return Reply(
            # SQLite cannot store half a surrogate pair.
            text=(choice.message.content or "").encode(errors="replace").decode(),
            complete=choice.finish_reason != "length",
            prompt_tokens=usage.prompt_tokens if usage else 0,
            completion_tokens=usage.completion_tokens if usage else 0,
        )

    def _count_retry(self, _: RetryCallState) -> None:
        self.retries += 1

    def _failed(self, error: Exception, attempts: int) -> JudgeFailed:
        judge = f"the judge at {self._config.url}"
        kept = "earlier ratings are kept"
        if _is_transient(error):
            what = f"HTTP {error.status_code}" if isinstance(error, APIStatusError) else "no answer"
            times = "once" if attempts == 1 else f"{attempts} times"
            return JudgeFailed(
                f"{judge} was asked {times} and failed ({what}: {_one_line(error)}); check that it runs and that "
                f"feedback.judge.url is right, then start again; {kept}"
            )
        if isinstance(error, APIStatusError):
            if error.status_code in (401, 403):
                remedy = "put a valid key into an environment variable and name it in feedback.judge.api_key_env"
            else:
                remedy = "mend feedback.judge.url, which usually ends in /v1, or feedback.judge.model"
            return JudgeFailed(f"{judge} answered HTTP {error.status_code} ({_one_line(error)}); {remedy}; {kept}")
        return JudgeFailed(
            f"{judge} does not answer as an OpenAI-compatible API does ({type(error).__name__}: {_one_line(error)}); "
            f"mend feedback.judge.url, which usually ends in /v1; {kept}"
        )


def _is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed when it is sent again."""
    if isinstance(error, APIStatusError):
        return error.status_code in (408, 429) or error.status_code >= 500
    return isinstance(error, APIConnectionError | TimeoutError)


def _wait_s(state: RetryCallState) -> float:
    """Seconds until the next attempt. They grow, have jitter, and are not less than the endpoint requires."""
    assert state.outcome is not None
    required = _retry_after(state.outcome.exception())
    # The required time needs jitter too, because the endpoint gives all requests the same one.
    return max(_BACKOFF(state), min(required, _MAX_RETRY_AFTER_S) + random.uniform(0, 1) if required else 0)


def _retry_after(error: BaseException | None) -> float:
    """The seconds in the Retry-After header, which holds a number or a date; 0 without a header."""
    value = error.response.headers.get("retry-after", "") if isinstance(error, APIStatusError) else ""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


def _one_line(error: Exception) -> str:
    """The message of an error in one line, cut to 300 characters; its class when there is no message."""
    return " ".join(str(error).split())[:300] or type(error).__name__
