"""Who gets in, and how many at once: keys, a bound on the body, a bound on the queue.

Invariant: nothing of a request is believed, held or worked on before it is found here to be allowed.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from aft_ray.config.run import ConfigError
from aft_ray.config.serve import AccessConfig, LimitsConfig
from aft_ray.serving.api.requests import Refusal

# Seconds between two looks whether the file of keys has changed.
_LOOK_S = 2.0


class Keys:
    """The bearer keys that open the service."""

    def __init__(self, access: AccessConfig) -> None:
        """Raises ConfigError when there is no key and `open` was not asked for."""
        self._file = Path(access.keys_file) if access.keys_file else None
        self._env = access.keys_env
        self._stamp: tuple[int, int] | None = None
        self._looked = 0.0
        self._keys: list[bytes] = []
        self._read()
        self.needed = bool(self._keys) or not access.open
        if self.needed and not self._keys:
            raise ConfigError(
                f"there are no keys to serve with: name a file of keys with access.keys_file, set {self._env}, or say "
                f"access.open=true to let anyone ask"
            )

    def check(self, authorization: str | None) -> None:
        """Raises Refusal (401) unless the header gives one of the keys."""
        if not self.needed:
            return
        self._read()
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not given:
            raise Refusal(
                401,
                "an API key is needed: send it as 'Authorization: Bearer KEY'",
                "authentication_error",
                None,
                "no_key",
            )
        # All of them are compared, each in constant time, so that the time tells nothing.
        matches = [hmac.compare_digest(key, given.strip().encode()) for key in self._keys]
        if not any(matches):
            raise Refusal(401, "this API key is not known here", "authentication_error", None, "invalid_api_key")

    def _read(self) -> None:
        if self._file is None:
            self._keys = [key.strip().encode() for key in os.environ.get(self._env, "").split(",") if key.strip()]
            return
        if time.monotonic() - self._looked < _LOOK_S:
            return
        self._looked = time.monotonic()
        try:
            status = self._file.stat()
            stamp = (status.st_mtime_ns, status.st_size)
            if stamp == self._stamp:
                return
            lines = [line.strip() for line in self._file.read_text().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            if self._stamp is None:
                raise ConfigError(f"access.keys_file={self._file} cannot be read: {error}") from error
            return  # being replaced, perhaps: the keys read last stay
        self._stamp = stamp
        self._keys = [line.encode() for line in lines if line and not line.startswith("#")]


class Admission:
    """Lets `concurrency` questions be worked on at once, lets `queue` more wait, and refuses the rest."""

    def __init__(self, limits: LimitsConfig) -> None:
        self._limits = limits
        self._slots = asyncio.Semaphore(limits.concurrency)
        self.inside = 0
        # Seconds that a question takes, a running mean for Retry-After.
        self._typical_s = 1.0

    @contextlib.asynccontextmanager
    async def enter(self, deadline_s: float) -> AsyncIterator[float]:
        """Yields the seconds waited. Raises Refusal: 429 when the queue is full, 504 when the deadline passes in it."""
        if self.inside >= self._limits.admitted:
            wait_s = self._typical_s * (self.inside / self._limits.concurrency)
            raise Refusal(
                429,
                f"{self.inside} questions are being answered or waiting, which is as many as are taken; try again "
                f"after the time in Retry-After",
                "rate_limit_error",
                None,
                "queue_full",
                wait_s,
            )
        self.inside += 1
        started = time.monotonic()
        try:
            try:
                await asyncio.wait_for(self._slots.acquire(), deadline_s)
            except TimeoutError:
                raise Refusal(
                    504, f"the question waited its whole deadline of {deadline_s:.0f} s", "timeout_error"
                ) from None
            entered = time.monotonic()
            try:
                yield entered - started
            finally:
                self._slots.release()
                self._typical_s += 0.1 * (time.monotonic() - entered - self._typical_s)
        finally:
            self.inside -= 1


class BodyLimit:
    """ASGI middleware: raises Refusal (413) for a body that is longer than allowed, before it is held in memory."""

    def __init__(self, app: Any, limit_bytes: int) -> None:
        self._app = app
        self._limit = limit_bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._limit:
            raise self._refusal()
        chunks: list[bytes] = []
        length, more = 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return  # the client has gone
            chunks.append(message.get("body", b""))
            length += len(chunks[-1])
            more = message.get("more_body", False)
            if length > self._limit:
                raise self._refusal()
        whole: list[Any] = [{"type": "http.request", "body": b"".join(chunks), "more_body": False}]

        async def replay() -> Any:
            return whole.pop() if whole else await receive()

        await self._app(scope, replay, send)

    def _refusal(self) -> Refusal:
        return Refusal(413, f"the request body is longer than {self._limit >> 10} KiB, limits.body_kib")
