"""The coordinator: an actor through which the driver and the train workers of a run tell each other what is done.

The driver tells it that a round is ready and which engines receive a broadcast; the train workers tell it that a
version is offered and that it is durable, that their GPUs are free, and what they measured. Invariants: it keeps
nothing durable, since a run that starts again learns everything from the ledger; every wait has a deadline; a failure
of one side ends all waits of the other at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from aft_ray.cluster.colocated_placement import WorkerPlacement
from aft_ray.coordination.broadcast_group import BroadcastGroup
from aft_ray.coordination.gpu_turns import GpuTurns, Turn


class OfferedVersion(Protocol):
    """What the coordinator reads of a version manifest (`weights.version_manifest.VersionManifest`)."""

    @property
    def version(self) -> int: ...

    @property
    def broadcast(self) -> object | None:
        """The broadcast that train worker 0 offers; None: it offers none."""
        ...

    @property
    def durable(self) -> bool:
        """Whether the model directory of the version was complete when it was offered."""
        ...

    def once_durable(self) -> OfferedVersion:
        """The manifest for the time when the directory is complete and the train workers may be gone."""
        ...


class PeerFailed(RuntimeError):
    """The other side of the run failed; the message is its reason."""


@dataclass(slots=True)
class _Rendezvous:
    """Of one version: the train workers that wait to broadcast it, and, once it is settled, the answer to all of them.

    Attributes:
        ranks: the train workers that wait or have waited.
        workers: the number of train workers.
        settled: whether the answer is final. The driver and the workers never get different answers.
        group: the engines that receive the broadcast; None: there is no broadcast.
    """

    ranks: set[int] = field(default_factory=set)
    workers: int = 0
    settled: bool = False
    group: BroadcastGroup | None = None

    @property
    def complete(self) -> bool:
        """Whether every train worker waits."""
        return 0 < self.workers <= len(self.ranks)

    def settle(self, group: BroadcastGroup | None) -> None:
        """Gives the answer, unless one was given before."""
        if not self.settled:
            self.settled, self.group = True, group


class Coordinator:
    """The actor. Its methods are asynchronous, so that one that waits does not block the others.

    `wait_*` methods raise PeerFailed when the other side has failed or the deadline has passed.
    """

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._ready: set[int] = set()
        self._newest: OfferedVersion | None = None
        self._newest_durable: OfferedVersion | None = None
        self._durable: set[int] = set()  # versions that train workers have written completely
        self._awaited: set[int] = set()  # versions whose directory the driver waits for
        self._was_requested: dict[int, bool] = {}  # what `is_requested` answered
        self._objects: dict[int, dict[int, dict[str, Any]]] = {}  # version -> rank -> references by name
        self._requested = -1  # the oldest version that the driver may still load into the samplers
        self._offered: int | None = None  # the version whose broadcast train worker 0 offers now
        self._rendezvous: dict[int, _Rendezvous] = {}
        self._gpus = GpuTurns()
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

        An offer to broadcast stands until it is answered, or the next manifest is published, or the train workers start
        again.
        """

        def change() -> None:
            self._end_offer()
            if manifest.broadcast is not None:
                self._offered = manifest.version
                if self._rendezvous_of(manifest.version).settled:  # the version is offered again
                    self._rendezvous[manifest.version] = _Rendezvous()
            if manifest.durable:
                self._durable.add(manifest.version)
            if self._newest is None or manifest.version >= self._newest.version:
                self._newest = manifest
                if manifest.durable:
                    self._newest_durable = manifest

        await self._change(change)

    async def begin_training(self) -> None:
        """Ends what train workers have offered from their memory. Those that start, or start again, call it.

        Nobody can send it any more. A version whose directory is not complete does not exist then, until it is offered
        again: its round is trained again.
        """

        def change() -> None:
            self._newest = self._newest_durable
            self._objects.clear()
            self._was_requested.clear()
            self._end_offer()
            for rendezvous in self._rendezvous.values():
                rendezvous.settle(None)
            self._rendezvous.clear()

        await self._change(change)

    async def set_durable(self, version: int) -> None:
        """Records that the model directory of a version is complete."""

        def change() -> None:
            self._durable.add(version)
            if self._newest is not None and self._newest.version == version:
                self._newest_durable = self._newest.once_durable()

        await self._change(change)

    async def is_durable(self, version: int) -> bool:
        """Whether the model directory of a version is complete."""
        return version in self._durable

    async def wait_durable(self, version: int, timeout_s: float) -> float:
        """Waits until the model directory of a version is complete; returns the seconds waited.

        Who calls it reads the directory, so that the train workers do not wait for a broadcast of the version.
        """
        await self._change(lambda: self._awaited.add(version))
        return await self._wait(
            lambda: version in self._durable,
            timeout_s,
            f"the model directory of policy version {version} to be written",
        )

    async def give_objects(self, version: int, rank: int, objects: dict[str, Any]) -> None:
        """Keeps a train worker's references to objects of a version until `take_objects` is called."""
        await self._change(lambda: self._objects.setdefault(version, {}).update({rank: objects}))

    async def take_objects(self, version: int, workers: int, timeout_s: float) -> dict[str, Any]:
        """The references of all `workers` train workers, by name."""
        of_version = self._objects.setdefault(version, {})
        await self._wait(
            lambda: len(of_version) == workers,
            timeout_s,
            f"the train workers to put version {version} into the object store",
            "training.timeout_s",
        )
        self._objects.pop(version, None)
        return {name: reference for objects in of_version.values() for name, reference in objects.items()}

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

    async def is_requested(self, version: int) -> bool:
        """Whether the driver asks for a version, or has asked for a later one: if not, its engines still sample.

        Every train worker gets the answer that the first one got.
        """
        return self._was_requested.setdefault(version, self._requested >= version)

    async def announce_broadcast(self, group: BroadcastGroup, timeout_s: float) -> str | None:
        """Tells the train workers which engines receive the broadcast of a version, once all of them wait for that.

        So engines never join a broadcast for which the train workers have not come, nor the other way round. Without
        receivers the train workers are told to wait no longer.

        Args:
            timeout_s: how long the train workers may take to come. Then the offer ends: they will not wait either.

        Returns:
            None when the engines can join now. Otherwise a sentence that says why there is no broadcast.

        Raises:
            PeerFailed: training has failed.
        """
        version = group.version
        rendezvous = self._rendezvous_of(version)

        def stands() -> bool:
            return self._offered == version and self._rendezvous.get(version) is rendezvous and not rendezvous.settled

        if stands() and group.receivers:
            await self._reached(lambda: not stands() or rendezvous.complete, timeout_s)
        if not stands():
            return f"the train workers do not offer the broadcast of version {version} any more"
        come = rendezvous.complete

        def change() -> None:
            rendezvous.settle(group if come and group.receivers else None)
            self._end_offer()

        await self._change(change)
        if not group.receivers:
            return f"no engine needs the broadcast of version {version}"
        if not come:
            return (
                f"the train workers did not come to the broadcast of version {version} within {timeout_s:.0f} s "
                f"(weights.timeout_s)"
            )
        return None

    async def wait_broadcast(self, version: int, rank: int, workers: int, timeout_s: float) -> BroadcastGroup | None:
        """The engines that receive the broadcast of a version, once the driver announces them.

        Every train worker calls it, and every one gets the same answer.

        Args:
            rank: the train worker that calls.
            workers: the number of train workers.

        Returns:
            None when there is no broadcast: the driver has gone on without the version, or has waited too long for the
            train workers, or did not come within `timeout_s`. The offer has ended then.

        Raises:
            PeerFailed: the run has failed.
        """
        rendezvous = self._rendezvous_of(version)

        def arrive() -> None:
            rendezvous.workers = workers
            rendezvous.ranks.add(rank)

        await self._change(arrive)
        await self._reached(lambda: rendezvous.settled or self._passed_over(version), timeout_s)

        def leave() -> None:
            if not rendezvous.settled:
                rendezvous.settle(None)
                if self._offered == version:
                    self._offered = None

        await self._change(leave)
        return rendezvous.group

    async def release_gpus(self, round_number: int, placement: WorkerPlacement) -> None:
        """Records that a train worker has released its GPUs to the samplers until the round is ready."""
        await self._change(lambda: self._gpus.release(round_number, placement))

    async def take_gpus(self, placement: WorkerPlacement, timeout_s: float) -> float:
        """Waits until a train worker may use its GPUs again; returns the seconds waited."""
        waited_s = await self._wait(
            lambda: self._gpus.turn is Turn.WORKERS, timeout_s, "the samplers to release the train workers' GPUs"
        )
        self._gpus.take(placement)
        return waited_s

    async def wait_gpus_released(self, round_number: int, timeout_s: float) -> list[WorkerPlacement]:
        """Waits until every train worker has released its GPUs before a round. It is the samplers' turn then.

        Returns:
            Where the train workers run.
        """
        await self._wait(
            lambda: bool(self._gpus.released(round_number)),
            timeout_s,
            f"the train workers to release their GPUs before round {round_number}",
            "training.timeout_s",
        )
        placements = self._gpus.released(round_number)
        await self._change(lambda: setattr(self._gpus, "turn", Turn.SAMPLERS))
        return placements

    async def enter_gpus(self, sampler: int, node: str, timeout_s: float) -> None:
        """Waits until it is the samplers' turn. A process of a colocated sampler calls it before it uses its GPUs.

        The process of the same sampler before it, if there was one, has ended.
        """
        await self._change(lambda: self._gpus.leave(sampler))
        await self._wait(lambda: self._gpus.turn is Turn.SAMPLERS, timeout_s, "the samplers' turn on the GPUs")
        self._gpus.enter(sampler, node)

    async def end_samplers_turn(self) -> None:
        """From now on no process of a sampler begins to use GPUs; those that use them must stop."""
        await self._change(lambda: setattr(self._gpus, "turn", Turn.ENDING))

    async def samplers_on_gpus(self) -> dict[int, str]:
        """The samplers whose processes have begun to use GPUs, in this turn or before it, and the processes' nodes."""
        return dict(self._gpus.samplers)

    async def return_gpus(self) -> None:
        """Gives the turn to the train workers, when the samplers have freed their memory."""
        await self._change(lambda: setattr(self._gpus, "turn", Turn.WORKERS))

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
        """Waits for a condition and returns the seconds waited. Raises PeerFailed after `timeout_s`.

        Args:
            awaited: what the error says was waited for.
            timeout_key: the config key of the deadline, for the error.
        """
        now = asyncio.get_running_loop().time
        started = now()
        if not await self._reached(condition, timeout_s):
            raise PeerFailed(f"waited {timeout_s:.0f} s for {awaited}; {timeout_key} sets this deadline")
        return now() - started

    async def _reached(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Waits for a condition; returns whether it came true within `timeout_s`. Raises PeerFailed after a failure."""
        async with self._changed:
            try:
                await asyncio.wait_for(
                    self._changed.wait_for(lambda: self._failure is not None or condition()), timeout_s
                )
            except TimeoutError:
                await self.check()
                return False
        await self.check()
        return True

    def _rendezvous_of(self, version: int) -> _Rendezvous:
        """The rendezvous of a version. A train worker may come before the version is published."""
        return self._rendezvous.setdefault(version, _Rendezvous())

    def _passed_over(self, version: int) -> bool:
        """Whether the driver takes a later version, or reads the directory of this one."""
        return self._requested > version or version in self._awaited

    def _end_offer(self) -> None:
        """Ends the offer that stands, if any. The train workers that wait for an announcement wait no longer."""
        if self._offered is not None:
            self._rendezvous_of(self._offered).settle(None)
            self._offered = None


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
