"""Which samplers answer at the moment. Every sampler is watched from its request to its end.

Invariant: only samplers that answer are ready to be called. A sampler whose process, engine or node is lost is not
ready from that moment on; Ray restarts it where there is room, and it is ready again as soon as it answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ray.exceptions import ActorDiedError, RayActorError, RayError

from aft_ray.cluster.remote_errors import traceback_message

# Seconds between two status calls to a sampler that is lost or has not answered yet, and to one that is ready.
_LOST_INTERVAL_S, _READY_INTERVAL_S = 2.0, 5.0
# Seconds after which a ready sampler that does not answer a status call is lost.
_STATUS_TIMEOUT_S = 30.0


class SamplersFailed(RuntimeError):
    """Fewer samplers answer than the run needs. The message says why each other one does not."""


@dataclass(frozen=True, slots=True)
class HealthChange:
    """A sampler became ready, or was lost for `reason`; after it `ready` of all `samplers` answer."""

    sampler: int
    ready: int
    samplers: int
    reason: str | None = None

    @property
    def line(self) -> str:
        """The change as a line for the terminal."""
        if self.reason is None:
            return f"sampler {self.sampler} answers ({self.ready} of {self.samplers})"
        return f"sampler {self.sampler} is lost: {self.reason} ({self.ready} of {self.samplers} left)"


class SamplerHealth:
    """Watches sampler actors, on one event loop.

    Attributes:
        ready: the indices of the samplers that answer.
    """

    def __init__(
        self,
        actors: Sequence[Any],
        ready: Iterable[int],
        minimum: int,
        timeout_s: float,
        why_not_ready: Callable[[int], str],
        on_change: Callable[[HealthChange], None] | None = None,
    ) -> None:
        """
        Args:
            ready: the samplers that are taken to be ready at the beginning.
            minimum: the number of samplers that the run needs.
            timeout_s: how long `wait_for_minimum` waits, seconds.
            why_not_ready: says why a sampler that has never answered does not.
            on_change: is called with every change.
        """
        self.ready = frozenset(ready)
        self._actors, self._minimum, self._timeout_s = actors, minimum, timeout_s
        self._why_not_ready, self._on_change = why_not_ready, on_change
        self._reasons: dict[int, str] = {}  # why each lost sampler was lost
        self._died: set[int] = set()  # the samplers that Ray does not restart any more
        self._changed = asyncio.Event()
        self._watchers: list[asyncio.Task[None]] = []

    def watch(self) -> None:
        """Begins to watch. The event loop must be running."""
        self._watchers = [asyncio.ensure_future(self._watch(index)) for index in range(len(self._actors))]

    async def close(self) -> None:
        """Stops watching."""
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)

    def mark_lost(self, index: int, reason: str) -> None:
        """Records that a call to a sampler failed. It is ready again when it answers a status call."""
        self._reasons[index] = reason
        if index in self.ready:
            self._change(self.ready - {index}, HealthChange(index, len(self.ready) - 1, len(self._actors), reason))

    async def wait_for_minimum(self, minimum: int | None = None) -> frozenset[int]:
        """Waits until at least `minimum` samplers are ready (None: as many as the run needs); returns those that are.

        Raises:
            SamplersFailed: too few are ready within the time that an engine may take to start, or too many will not be
                restarted.
        """
        minimum = minimum or self._minimum
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout_s
        while len(self.ready) < minimum:
            left = deadline - loop.time()
            if left <= 0 or len(self._actors) - len(self._died) < minimum:
                raise SamplersFailed(self._too_few_message(minimum, left <= 0))
            try:
                await asyncio.wait_for(self._changed.wait(), left)
            except TimeoutError:
                continue
        return self.ready

    async def _watch(self, index: int) -> None:
        while True:
            timeout_s = _STATUS_TIMEOUT_S if index in self.ready else None
            try:
                # Ray queues the first call until the actor has been placed and its engine has started.
                await asyncio.wait_for(self._actors[index].status.remote(), timeout_s)
            except ActorDiedError as error:
                self._died.add(index)
                self.mark_lost(index, reason_of(error))
                self._notify_waiting()
                return
            except RayError as error:
                self.mark_lost(index, reason_of(error))
            except TimeoutError:
                self.mark_lost(index, f"it has not answered for {_STATUS_TIMEOUT_S:.0f} s")
            else:
                if index not in self.ready:
                    self._change(self.ready | {index}, HealthChange(index, len(self.ready) + 1, len(self._actors)))
            await asyncio.sleep(_READY_INTERVAL_S if index in self.ready else _LOST_INTERVAL_S)

    def _change(self, ready: frozenset[int], change: HealthChange) -> None:
        self.ready = ready
        self._notify_waiting()
        if self._on_change is not None:
            self._on_change(change)

    def _notify_waiting(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _too_few_message(self, minimum: int, timed_out: bool) -> str:
        missing = [index for index in range(len(self._actors)) if index not in self.ready]
        samplers_by_reason: dict[str, list[str]] = {}
        for index in missing:
            known = self._reasons.get(index)
            if index in self._died and known:
                reason = known
            else:
                reason = self._why_not_ready(index) + (f", {known}" if known else "")
            samplers_by_reason.setdefault(reason, []).append(str(index))
        reasons = "; ".join(
            f"sampler{'s' if len(names) > 1 else ''} {', '.join(names)}: {reason}"
            for reason, names in samplers_by_reason.items()
        )
        return (
            f"{len(self.ready)} of {len(self._actors)} samplers answer and {minimum} must (sampling.min_samplers)"
            + (f", after {self._timeout_s:.0f} s (sampling.start_timeout_s)" if timed_out else "")
            + f"; {reasons}"
        )


def reason_of(error: BaseException) -> str:
    """Why a call to a sampler failed, as a short phrase."""
    if isinstance(error, ActorDiedError):
        return f"Ray does not restart it any more: {traceback_message(str(error))}"
    if isinstance(error, RayActorError):
        return "its process or node ended"
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {traceback_message(str(cause))}"
