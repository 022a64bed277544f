"""Which phase of a publication an engine is in, since when, and how long each has taken.

Entered by the engine's thread, watched by the actor's event loop. Invariant: at most one phase runs at a time.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from concurrent.futures import Future
from typing import TypeVar

from aft_ray.weights.receive_plan import Phase

T = TypeVar("T")
# Seconds that a phase may take beyond its deadline, so that who keeps to it can say what it waited for.
GRACE_S = 10.0


class PhaseTimeout(RuntimeError):
    """A phase did not end by its deadline."""


class UpdatePhases:
    """The phases of one publication to one engine."""

    def __init__(self) -> None:
        self.seconds: Counter[Phase] = Counter()
        self._present: tuple[Phase, float] | None = None

    def enter(self, phase: Phase) -> None:
        self.leave()
        self._present = phase, time.monotonic()

    def leave(self) -> None:
        if self._present is not None:
            phase, since = self._present
            self.seconds[phase] += time.monotonic() - since  # type: ignore[assignment]
        self._present = None

    @property
    def name(self) -> str:
        return self._present[0] if self._present is not None else "idle"

    async def watch(self, work: Future[T], timeout_s: float) -> T:
        """What `work` returns. Raises PhaseTimeout when it stays in one phase for longer than `timeout_s`, and a grace."""
        result = asyncio.wrap_future(work)
        while True:
            entered = self._present
            left = timeout_s + GRACE_S - (time.monotonic() - entered[1] if entered else 0.0)
            done, _ = await asyncio.wait({result}, timeout=max(0.0, left))
            if done:
                return result.result()
            if entered is not None and entered is self._present:
                raise PhaseTimeout(f"phase {entered[0]!r} did not end within {timeout_s:.0f} s")
