"""Many share, one excludes: calls go on side by side until something must happen while none is running.

Invariant: who waits for exclusion is not overtaken by calls that come later.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator


class ReadWriteLock:
    """For one event loop."""

    def __init__(self) -> None:
        self._inside = 0
        self._closed = False
        self._changed = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Waits while another excludes or waits to exclude."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._closed)
            self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            if self._closed:
                async with self._changed:
                    self._changed.notify_all()

    @contextlib.asynccontextmanager
    async def exclusive(self, timeout_s: float) -> AsyncIterator[None]:
        """Alone inside. Raises TimeoutError, and lets the others go on, when those inside do not leave in time."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._closed)
            self._closed = True
        try:
            async with self._changed:
                await asyncio.wait_for(self._changed.wait_for(lambda: self._inside == 0), timeout_s)
            yield
        finally:
            async with self._changed:
                self._closed = False
                self._changed.notify_all()
