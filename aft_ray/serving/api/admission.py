"""Admission: how many questions one reasoner answers at once, and how many may wait for that.

Invariant: at most `limits.concurrency` questions are answered at once and at most `limits.queue` more wait; every
other question is rejected at once with the time after which to try again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from aft_ray.config.serve import LimitsConfig
from aft_ray.serving.api.errors import ApiError

# Weight of the newest question in the moving average of the time that a question takes.
_SMOOTHING = 0.1


class AdmissionQueue:
    """The queue of one reasoner. `in_progress` counts the questions that are being answered or waiting."""

    def __init__(self, limits: LimitsConfig) -> None:
        self._limits = limits
        self._slots = asyncio.Semaphore(limits.concurrency)
        self.in_progress = 0
        # Moving average of the seconds that a question takes; Retry-After is computed from it.
        self._average_s = 1.0

    @contextlib.asynccontextmanager
    async def admit(self, deadline_s: float) -> AsyncIterator[float]:
        """Holds a slot while the context is open, and yields the seconds that the question waited for it.

        Raises:
            ApiError: 429 when the queue is full; 504 when no slot is free within `deadline_s`.
        """
        if self.in_progress >= self._limits.admitted:
            wait_s = self._average_s * (self.in_progress / self._limits.concurrency)
            raise ApiError(
                429,
                f"{self.in_progress} questions are being answered or waiting, which is the most that this service "
                f"takes; try again after the seconds in Retry-After",
                "rate_limit_error",
                None,
                "queue_full",
                wait_s,
            )
        self.in_progress += 1
        started = time.monotonic()
        try:
            try:
                await asyncio.wait_for(self._slots.acquire(), deadline_s)
            except TimeoutError:
                raise ApiError(
                    504,
                    f"the question waited in the queue for its whole deadline of {deadline_s:.0f} s",
                    "timeout_error",
                ) from None
            admitted = time.monotonic()
            try:
                yield admitted - started
            finally:
                self._slots.release()
                self._average_s += _SMOOTHING * (time.monotonic() - admitted - self._average_s)
        finally:
            self.in_progress -= 1
