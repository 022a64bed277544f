"""Which samplers answer at the moment: every one is watched, from the moment it is asked for to its end.

Invariant: a sampler is asked only while it answers. One whose process, engine or node is gone stops being asked at
once; Ray starts it again where there is room, and it is a member again as soon as it answers.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ray.exceptions import ActorDiedError, RayActorError, RayError

# Seconds between two looks at a sampler that is away, and at one that answered; patience with the latter.
_AWAY_S, _THERE_S, _SILENT_S = 2.0, 5.0, 30.0
# How a traceback begins the line of an exception that is defined here.
_OURS = re.compile(r"^aft_ray(\.\w+)+: ")


class SamplersFailed(RuntimeError):
    """Fewer samplers answer than the run needs. Says of the others why not, and where to look."""


@dataclass(frozen=True, slots=True)
class HealthChange:
    """A sampler joined the others, or was lost (`reason`); `ready` of all `samplers` answer after it."""

    sampler: int
    ready: int
    samplers: int
    reason: str | None = None

    @property
    def line(self) -> str:
        if self.reason is None:
            return f"sampler {self.sampler} answers ({self.ready} of {self.samplers})"
        return f"sampler {self.sampler} is lost: {self.reason} ({self.ready} of {self.samplers} left)"


class SamplerHealth:
    """The watch over some sampler actors, on the event loop of whoever made it.

    ready: the samplers that answer, to begin with those that did lately. minimum: how many must. why: says of a sampler
    that never answered what it waits for. tell: is told of every change.
    """

    def __init__(
        self,
        actors: Sequence[Any],
        ready: Iterable[int],
        minimum: int,
        timeout_s: float,
        why: Callable[[int], str],
        tell: Callable[[HealthChange], None] | None = None,
    ) -> None:
        self.ready = frozenset(ready)
        self._actors, self._minimum, self._timeout_s, self._why, self._tell = actors, minimum, timeout_s, why, tell
        self._reasons: dict[int, str] = {}
        self._died: set[int] = set()
        self._changed = asyncio.Event()
        self._watchers: list[asyncio.Task[None]] = []

    def watch(self) -> None:
        """Begins to watch; the event loop must be running."""
        self._watchers = [asyncio.ensure_future(self._watch(index)) for index in range(len(self._actors))]

    async def close(self) -> None:
        """Ends the watch."""
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)

    def lost(self, index: int, reason: str) -> None:
        """A call to a sampler failed: it is not asked until it answers again."""
        self._reasons[index] = reason
        if index in self.ready:
            self._change(self.ready - {index}, HealthChange(index, len(self.ready) - 1, len(self._actors), reason))

    async def enough(self, minimum: int | None = None) -> frozenset[int]:
        """The samplers that answer, at least `minimum` of them (none: as many as the run needs).

        Waits for them as long as an engine may take to start. Raises SamplersFailed then, or as soon as too many are
        gone for good.
        """
        minimum = minimum or self._minimum
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout_s
        while len(self.ready) < minimum:
            left = deadline - loop.time()
            if left <= 0 or len(self._actors) - len(self._died) < minimum:
                raise SamplersFailed(self._sentence(minimum, left <= 0))
            try:
                await asyncio.wait_for(self._changed.wait(), left)
            except TimeoutError:
                continue
        return self.ready

    async def _watch(self, index: int) -> None:
        while True:
            there = index in self.ready
            try:
                # The first call waits in Ray's queue until the actor has a place and its engine runs.
                await asyncio.wait_for(self._actors[index].status.remote(), _SILENT_S if there else None)
            except ActorDiedError as error:
                self._died.add(index)
                self.lost(index, reason_of(error))
                self._wake()
                return
            except RayError as error:
                self.lost(index, reason_of(error))
            except TimeoutError:
                self.lost(index, f"it has not answered for {_SILENT_S:.0f} s")
            else:
                if index not in self.ready:
                    self._change(self.ready | {index}, HealthChange(index, len(self.ready) + 1, len(self._actors)))
            await asyncio.sleep(_THERE_S if index in self.ready else _AWAY_S)

    def _change(self, ready: frozenset[int], change: HealthChange) -> None:
        self.ready = ready
        self._wake()
        if self._tell is not None:
            self._tell(change)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _sentence(self, minimum: int, too_late: bool) -> str:
        missing = [index for index in range(len(self._actors)) if index not in self.ready]
        alike: dict[str, list[str]] = {}
        for index in missing:
            known = self._reasons.get(index)
            reason = known if index in self._died and known else self._why(index) + (f", {known}" if known else "")
            alike.setdefault(reason, []).append(str(index))
        said = "; ".join(
            f"sampler{'s' if len(names) > 1 else ''} {', '.join(names)}: {reason}" for reason, names in alike.items()
        )
        return (
            f"{len(self.ready)} of {len(self._actors)} samplers answer and {minimum} must (sampling.min_samplers)"
            + (f", after {self._timeout_s:.0f} s (sampling.start_timeout_s)" if too_late else "")
            + f"; {said}"
        )


def reason_of(error: BaseException) -> str:
    """Why a call to a sampler failed, in a few words."""
    if isinstance(error, ActorDiedError):
        return f"it is gone for good: {last_line(str(error))}"
    if isinstance(error, RayActorError):
        return "its process or node ended"
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {last_line(str(cause))}"


def last_line(text: str) -> str:
    """The error itself of a remote traceback: the last one of our own, which is a sentence, else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    ours = [sentence for line in lines if (sentence := _OURS.sub("", line)) != line]
    return (ours or lines or ["no reason given"])[-1]
