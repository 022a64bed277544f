"""A read-write lock for one event loop: any number of readers at once, or a single writer.

Requests hold it as readers, a weight update as the writer. Invariant: a reader that arrives after a waiting writer is
admitted after that writer.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator


class ReadWriteLock:
    """Both methods are asynchronous context managers, which hold the lock inside their block."""

    def __init__(self) -> None:
        self._readers = 0
        self._writing = False  # a writer holds the lock, or waits for the readers to leave
        self._changed = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Holds the lock as a reader. Waits while a writer holds it or waits for it."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._writing)
            self._readers += 1
        try:
            yield
        finally:
            self._readers -= 1
            if self._writing:
                async with self._changed:
                    self._changed.notify_all()

    @contextlib.asynccontextmanager
    async def exclusive(self, timeout_s: float) -> AsyncIterator[None]:
        """Holds the lock as the writer.

        Raises:
            TimeoutError: the readers did not leave within `timeout_s` seconds. Waiting readers are admitted again.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: not self._writing)
            self._writing = True
        try:
            async with self._changed:
                await asyncio.wait_for(self._changed.wait_for(lambda: self._readers == 0), timeout_s)
            yield
        finally:
            async with self._changed:
                self._writing = False
                self._changed.notify_all()
