"""The phase that an engine's weight update is in, the seconds that each phase took, and the deadline of a phase.

The thread that updates the weights enters the phases; an event loop watches them. Invariant: at most one phase is
running at a time.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from concurrent.futures import Future
from typing import TypeVar

from aft_ray.weights.receive_plan import Phase
from aft_ray.weights.version_manifest import WeightUpdateFailed

T = TypeVar("T")
# Seconds that `watch` waits beyond a phase's deadline, so that code inside the phase that keeps the same deadline fails
# first, with an error that says what it waited for.
GRACE_S = 10.0


class PhaseTimeout(WeightUpdateFailed):
    """A phase did not end by its deadline. The engine may be blocked in it for ever."""


class UpdatePhases:
    """The phases of one weight update of one engine.

    Attributes:
        seconds: how long each phase that has ended took.
    """

    def __init__(self) -> None:
        self.seconds: Counter[Phase] = Counter()
        self._current: tuple[Phase, float] | None = None  # the phase, and when it was entered

    def enter(self, phase: Phase) -> None:
        """Ends the current phase, if any, and begins another."""
        self.leave()
        self._current = phase, time.monotonic()

    def leave(self) -> None:
        """Ends the current phase, if any."""
        if self._current is not None:
            phase, since = self._current
            self.seconds[phase] += time.monotonic() - since  # type: ignore[assignment]
        self._current = None

    @property
    def name(self) -> str:
        """The current phase; "idle" when there is none."""
        return self._current[0] if self._current is not None else "idle"

    async def watch(self, work: Future[T] | asyncio.Future[T], timeout_s: float) -> T:
        """Waits for `work`, and returns its result.

        Raises:
            PhaseTimeout: one phase has lasted longer than `timeout_s` seconds and GRACE_S.
        """
        result = asyncio.wrap_future(work)
        while True:
            watched = self._current
            left = timeout_s + GRACE_S - (time.monotonic() - watched[1] if watched else 0.0)
            done, _ = await asyncio.wait({result}, timeout=max(0.0, left))
            if done:
                return result.result()
            if watched is not None and watched is self._current:
                raise PhaseTimeout(f"phase {watched[0]!r} did not end within {timeout_s:.0f} s")
