"""The coordinator: an actor through which the driver and the train workers of a run tell each other what is done.

The driver tells it that a round is ready and which engines receive a broadcast; the train workers tell it that a
version is published, that their GPUs are free, and what they measured. Invariants: it keeps nothing durable, since a
run that starts again learns everything from the ledger; every wait has a deadline; a failure of one side ends all waits
of the other at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from aft_ray.cluster.colocated_placement import WorkerPlacement
from aft_ray.coordination.broadcast_group import BroadcastGroup


class OfferedVersion(Protocol):
    """What the coordinator reads of a version manifest (`weights.version_manifest.VersionManifest`)."""

    @property
    def version(self) -> int: ...

    @property
    def broadcast(self) -> object | None:
        """The broadcast that train worker 0 offers; None: it offers none."""
        ...


class PeerFailed(RuntimeError):
    """The other side of the run failed; the message is its reason."""


class Coordinator:
    """The actor. Its methods are asynchronous, so that one that waits does not block the others.

    `wait_*` methods raise PeerFailed when the other side has failed or the deadline has passed.
    """

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._ready: set[int] = set()
        self._newest: OfferedVersion | None = None
        self._requested = -1  # the oldest version that the driver may still load into the samplers
        self._offered: int | None = None  # the version whose broadcast train worker 0 offers now
        self._broadcasts: dict[int, BroadcastGroup] = {}
        self._released: dict[int, dict[int, WorkerPlacement]] = {}
        self._events: list[dict[str, Any]] = []
        self._failure: str | None = None

    async def set_ready(self, round_number: int) -> None:
        """Records that every group of the round is in the ledger."""
        await self._change(lambda: self._ready.add(round_number))

    async def wait_ready(self, round_number: int, timeout_s: float) -> float:
        """Waits until a round is ready; returns the seconds waited."""
        return await self._wait(
            lambda: round_number in self._ready, timeout_s, f"the groups of round {round_number} to be complete"
        )

    async def publish(self, manifest: OfferedVersion) -> None:
        """Offers a version to the samplers. Only the newest manifest is kept, so that Ray frees older objects.

        An offer to broadcast stands until the next manifest is published. Train workers that have started again publish
        their last version from disk, which ends an offer of their predecessors, whose store has closed.
        """

        def change() -> None:
            self._offered = manifest.version if manifest.broadcast is not None else None
            if self._newest is None or manifest.version >= self._newest.version:
                self._newest = manifest

        await self._change(change)

    async def wait_version(self, version: int, timeout_s: float) -> tuple[OfferedVersion, float]:
        """Waits until a version is published that is at least `version`; returns the newest and the seconds waited."""
        self._requested = max(self._requested, version)
        await self._change(lambda: None)
        waited_s = await self._wait(
            lambda: self._newest is not None and self._newest.version >= version,
            timeout_s,
            f"policy version {version} to be trained",
        )
        assert self._newest is not None
        return self._newest, waited_s

    async def announce_broadcast(self, group: BroadcastGroup) -> bool:
        """Tells the train workers which engines receive the broadcast of a version; with none they need not wait.

        Returns:
            Whether the engines can join. False when the offer does not stand any more, because train workers have
            started again, or when the broadcast of this version was announced before.
        """
        if self._offered != group.version:
            return False

        def change() -> None:
            self._offered = None
            self._broadcasts[group.version] = group

        await self._change(change)
        return True

    async def wait_broadcast(self, version: int, timeout_s: float) -> BroadcastGroup | None:
        """The broadcast group of a version once the driver announces it; None when the driver skips the version."""
        await self._wait(
            lambda: version in self._broadcasts or self._requested > version,
            timeout_s,
            f"the samplers to take policy version {version}",
        )
        return self._broadcasts.get(version)

    async def release_gpus(self, round_number: int, placement: WorkerPlacement) -> None:
        """Records that a train worker has released its GPUs to the samplers until the round is ready."""
        await self._change(lambda: self._released.setdefault(round_number, {}).update({placement.rank: placement}))

    async def wait_gpus_released(self, round_number: int, timeout_s: float) -> list[WorkerPlacement]:
        """Waits until every train worker has released its GPUs before a round; returns where the workers run."""
        placements = self._released.setdefault(round_number, {})
        await self._wait(
            lambda: any(len(placements) == placement.workers for placement in placements.values()),
            timeout_s,
            f"the train workers to release their GPUs before round {round_number}",
            "training.timeout_s",
        )
        return list(placements.values())

    async def post(self, event: dict[str, Any]) -> None:
        """Keeps an event for the driver, which reports it in its metrics and progress."""
        self._events.append(event)

    async def drain(self) -> list[dict[str, Any]]:
        """The events since the last call."""
        events, self._events = self._events, []
        return events

    async def check(self) -> None:
        """Raises PeerFailed when the other side has failed."""
        if self._failure is not None:
            raise PeerFailed(self._failure)

    async def fail(self, reason: str) -> None:
        """Ends every wait with PeerFailed. If it is called several times, the first reason counts."""
        if self._failure is None:
            self._failure = reason
        await self._change(lambda: None)

    async def _change(self, change: Callable[[], Any]) -> None:
        """Makes a change, after which every wait checks its condition again."""
        async with self._changed:
            change()
            self._changed.notify_all()

    async def _wait(
        self, condition: Callable[[], bool], timeout_s: float, awaited: str, timeout_key: str = "rounds.timeout_s"
    ) -> float:
        """Waits for a condition and returns the seconds waited.

        Args:
            awaited: what the error says was waited for.
            timeout_key: the config key of the deadline, for the error.
        """
        now = asyncio.get_running_loop().time
        started = now()
        async with self._changed:
            try:
                await asyncio.wait_for(
                    self._changed.wait_for(lambda: self._failure is not None or condition()), timeout_s
                )
            except TimeoutError:
                raise PeerFailed(f"waited {timeout_s:.0f} s for {awaited}; {timeout_key} sets this deadline") from None
        await self.check()
        return now() - started


def call(method: Any, *args: Any) -> Any:
    """Calls a method of the actor and returns its value. Raises PeerFailed with its reason, without Ray's frames."""
    try:
        return ray.get(method.remote(*args))
    except PeerFailed as error:
        raise PeerFailed(str(getattr(error, "cause", error)).strip().splitlines()[-1]) from None


def start_coordinator() -> Any:
    """Starts the actor on the driver's node, so that the loss of another node does not end it."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Coordinator).options(num_cpus=0, max_concurrency=1000, scheduling_strategy=here).remote()
