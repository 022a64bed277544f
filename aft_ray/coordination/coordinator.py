"""What sampling and training tell each other while a run lives: rounds that are ready, versions, events, failure.

Invariant: nothing durable lives here; after a restart the board is filled again from the ledger. Every wait has a
deadline, and a failure on one side ends the waits of the other at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from aft_ray.cluster.colocated_placement import WorkerPlacement
from aft_ray.coordination.broadcast_group import BroadcastGroup, StoreAddress
from aft_ray.weights.version_manifest import VersionManifest


class PeerFailed(RuntimeError):
    """The other side of the run failed; the message is its reason."""


class Coordinator:
    """An actor of the driver's. Methods are asynchronous, so waits do not block each other."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._ready: set[int] = set()
        self._manifests: dict[int, VersionManifest] = {}
        self._given_way: dict[int, dict[int, WorkerPlacement]] = {}
        self._wanted = -1  # the oldest version that the conductor may still bring to the samplers
        self._invitations: dict[int, BroadcastGroup] = {}
        self._tables: dict[int, StoreAddress] = {}
        self._events: list[dict[str, Any]] = []
        self._failure: str | None = None

    async def set_ready(self, round_number: int) -> None:
        """Every group of the round is in the ledger."""
        await self._change(lambda: self._ready.add(round_number))

    async def wait_ready(self, round_number: int, timeout_s: float) -> float:
        """Waits for a round's groups; returns the seconds waited."""
        return await self._wait(
            lambda: round_number in self._ready, timeout_s, f"the groups of round {round_number} to be complete"
        )

    async def publish(self, manifest: VersionManifest) -> None:
        """Offers a version to the samplers. Older versions are let go, and with them their objects."""

        def change() -> None:
            newest = max([manifest.version, *self._manifests])
            self._manifests = {newest: manifest if manifest.version == newest else self._manifests[newest]}

        await self._change(change)

    async def wait_version(self, version: int, timeout_s: float) -> tuple[VersionManifest, float]:
        """The newest version, once it is at least `version`; and the seconds waited."""
        self._wanted = max(self._wanted, version)
        await self._change(lambda: None)
        waited = await self._wait(
            lambda: max(self._manifests, default=-1) >= version, timeout_s, f"policy version {version} to be trained"
        )
        return self._manifests[max(self._manifests)], waited

    async def release_gpus(self, round_number: int, seat: WorkerPlacement) -> None:
        """A train worker has left its GPUs to the samplers, until the groups of the round are complete."""
        await self._change(lambda: self._given_way.setdefault(round_number, {}).update({seat.rank: seat}))

    async def wait_gpus_released(self, round_number: int, timeout_s: float) -> list[WorkerPlacement]:
        """Waits until every train worker has given way before a round; where they sit."""
        placements = self._given_way.setdefault(round_number, {})
        await self._wait(
            lambda: any(len(placements) == seat.workers for seat in placements.values()),
            timeout_s,
            f"the train workers to leave their GPUs before round {round_number}",
        )
        return list(placements.values())

    async def invite(self, invitation: BroadcastGroup, timeout_s: float) -> StoreAddress | None:
        """Calls the trainer to the meeting of a version that it offered; where it sits.

        None when it does not come: the meeting was held already, or the train workers have started again since.
        """
        version = invitation.version
        if version in self._invitations or not self._offers_meeting(version):
            return None
        await self._change(lambda: self._invitations.update({version: invitation}))
        if not invitation.guests:
            return None
        try:
            await self._wait(
                lambda: version in self._tables or not self._offers_meeting(version),
                timeout_s,
                f"the trainer to open the meeting of version {version}",
            )
        except PeerFailed:
            await self.check()
        return self._tables.get(version)

    async def wait_invitation(self, version: int, timeout_s: float) -> BroadcastGroup | None:
        """Waits until the conductor invites to a version's meeting; None when it goes on without this version."""
        await self._wait(
            lambda: version in self._invitations or self._wanted > version,
            timeout_s,
            f"the samplers to come for policy version {version}",
        )
        return self._invitations.get(version)

    async def open_table(self, version: int, table: StoreAddress) -> None:
        """The trainer waits for the engines there."""
        await self._change(lambda: self._tables.update({version: table}))

    def _offers_meeting(self, version: int) -> bool:
        manifest = self._manifests.get(version)
        return manifest is not None and manifest.broadcast is not None

    async def post(self, event: dict[str, Any]) -> None:
        """An event for the driver's metrics and progress."""
        self._events.append(event)

    async def drain(self) -> list[dict[str, Any]]:
        """The events since the last call."""
        events, self._events = self._events, []
        return events

    async def check(self) -> None:
        """Raises PeerFailed when the other side failed."""
        if self._failure is not None:
            raise PeerFailed(self._failure)

    async def fail(self, reason: str) -> None:
        """Ends every wait with PeerFailed. The first reason counts."""
        if self._failure is None:
            self._failure = reason
        await self._change(lambda: None)

    async def _change(self, change: Callable[[], Any]) -> None:
        async with self._changed:
            change()
            self._changed.notify_all()

    async def _wait(self, condition: Callable[[], bool], timeout_s: float, what: str) -> float:
        now = asyncio.get_running_loop().time
        started = now()
        async with self._changed:
            try:
                await asyncio.wait_for(
                    self._changed.wait_for(lambda: self._failure is not None or condition()), timeout_s
                )
            except TimeoutError:
                raise PeerFailed(f"waited {timeout_s:.0f} s for {what}; rounds.timeout_s sets this deadline") from None
        await self.check()
        return now() - started


def call(method: Any, *args: Any) -> Any:
    """Calls a board method and returns its value. Raises PeerFailed with the reason, not with Ray's traceback."""
    try:
        return ray.get(method.remote(*args))
    except PeerFailed as error:
        raise PeerFailed(str(getattr(error, "cause", error)).strip().splitlines()[-1]) from None


def start_coordinator() -> Any:
    """A board that lives as long as the driver, on its node: another node may be lost while the run goes on."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Coordinator).options(num_cpus=0, max_concurrency=1000, scheduling_strategy=here).remote()
