"""An asyncio event loop with virtual time: its clock stands still while code runs, and advances to the next timer when
every coroutine waits.

Invariants: time never goes back; nothing waits in real time; the same coroutines with the same seeds give the same
times. Code that reads the time from its event loop (`loop.time()`, `asyncio.sleep`, `wait_for`) runs in it unchanged.
"""

from __future__ import annotations

import asyncio
import selectors


class Stuck(RuntimeError):
    """Every coroutine waits and no timer is set: the coroutines wait for each other for ever."""


class _VirtualClockSelector(selectors.SelectSelector):
    """A selector that advances the clock where another one would sleep until a timer is due."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise Stuck("every coroutine waits for another, and no timer is set")
        self.now += max(0.0, timeout)
        return []


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose time is virtual, in seconds from 0."""

    def __init__(self) -> None:
        self._virtual_clock = _VirtualClockSelector()
        super().__init__(self._virtual_clock)
        # Timers that are nearer together than this fire together. It is more than the rounding of a double at 10^6 s.
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self._virtual_clock.now
