"""The sending side of a weight broadcast: rank 0 offers it, waits for the engines, and sends them its live weights.

Invariants: a process group serves one version; an engine that does not join, or ends, leads to a `BroadcastFailed`
within the deadline of its phase and fails neither training nor the run; the weights are read, never changed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch

from aft_ray.config.messages import first_line
from aft_ray.coordination.broadcast_group import BroadcastGroup
from aft_ray.weights.broadcast.buckets import Layout, ProcessGroup, Wait, send
from aft_ray.weights.broadcast.gloo_group import GlooGroup
from aft_ray.weights.broadcast.nccl_group import NcclGroup
from aft_ray.weights.broadcast.rendezvous import missing_ranks, open_store
from aft_ray.weights.export import LayerPass, layout_of
from aft_ray.weights.publish import Publication, Transport
from aft_ray.weights.receive_plan import BroadcastOffer


class BroadcastFailed(RuntimeError):
    """A broadcast did not start or did not end. The message names the version and the phase."""


@dataclass(frozen=True, slots=True)
class BroadcastStats:
    """Seconds until every rank had arrived, seconds until the last bucket was sent, and the bytes of the weights."""

    rendezvous_s: float
    stream_s: float
    bytes: int


class BroadcastControl(Protocol):
    """How the train workers learn who receives a broadcast, and report how it ended."""

    @property
    def address(self) -> str:
        """The address of this node, at which the engines reach rank 0's store."""
        ...

    def is_requested(self, version: int) -> bool:
        """Whether the driver asks for a version now; every rank gets the same answer."""
        ...

    def wait_group(self, version: int) -> BroadcastGroup | None:
        """Waits until the driver has announced the broadcast group of a version; every rank gets the same answer.

        None when the driver went on to a newer version without announcing one.
        """
        ...

    def report(self, version: int, result: BroadcastStats | BroadcastFailed) -> None:
        """Reports how the broadcast of a version ended. Called on rank 0."""
        ...


class Sender(ProcessGroup, Protocol):
    """Rank 0 of a process group, from the opening of its store to the end of the group."""

    port: int
    device: torch.device

    def form(self, names: list[str], timeout_s: float) -> None:
        """Waits until the other ranks have joined; `names` has the owner of each rank."""
        ...

    def begin(self, timeout_s: float) -> None:
        """Starts the clock of the next phase: everything must have been sent within `timeout_s`."""
        ...

    def destroy(self) -> None:
        """Ends the group and closes its store, so that no engine waits for this rank."""
        ...


class Broadcast(Transport):
    """The transport `nccl`: rank 0 sends its live weights to all engines at once, over NCCL or, without GPUs, gloo.

    Rank 0 opens the store of the process group when it publishes a version. An engine that takes no part in the
    broadcast, for instance because it starts later, reads the model directory.
    """

    def __init__(
        self,
        control: BroadcastControl,
        bucket_bytes: int,
        timeout_s: float,
        gpu: bool,
    ) -> None:
        """
        Args:
            timeout_s: deadline of each phase of a broadcast.
        """
        self._control, self._bucket_bytes, self._timeout_s = control, bucket_bytes, timeout_s
        self._open_sender: type[GlooSender] | type[NcclSender] = NcclSender if gpu else GlooSender
        self._finished: Sender | None = None  # of the version that was sent last; its group has not ended yet
        self._waiting: Publication | None = None  # the version whose weights `finish` sends

    def deliver(self, publication: Publication) -> None:
        """Sends the weights in the only pass, if the engines wait for them; else `finish` sends them."""
        if self._control.is_requested(publication.manifest.version):
            self._broadcast(publication)
            publication.store()
        else:
            publication.layers.run()
            publication.store()
            self._waiting = publication

    def finish(self) -> None:
        """Sends the weights to engines that were busy. The layers are gathered again, while training would only wait.

        So the version is durable in spite of engines that sample for long.
        """
        publication, self._waiting = self._waiting, None
        if publication is not None:
            self._broadcast(publication)

    def _broadcast(self, publication: Publication) -> None:
        """Offers the broadcast, waits for the driver, and sends. A broadcast that fails is reported, not raised."""
        manifest, layers = publication.manifest, publication.layers
        offered: tuple[Sender, Layout] | None = None
        if layers.rank == 0:
            layout = layout_of(layers.module, getattr(torch, layers.plan.dtype), self._bucket_bytes)
            offered = self._open_sender(self._timeout_s), layout
            offer = BroadcastOffer(self._control.address, offered[0].port, layout)
            publication.offer(replace(manifest, broadcast=offer))
        group = self._control.wait_group(manifest.version)
        # The last buckets of the version before may have been on their way when `send` returned. The driver has
        # waited for the engines since, so that its group can end now.
        if self._finished is not None:
            self._finished.destroy()
            self._finished = None
        receivers = group.receivers if group is not None else ()
        if offered is not None and group is not None and receivers:
            self._send(*offered, layers, group)
            return
        if offered is not None:
            offered[0].destroy()
        if receivers or not layers.copied:
            layers.run()

    def _send(self, sender: Sender, layout: Layout, layers: LayerPass, group: BroadcastGroup) -> None:
        tensors = layers.tensors()
        try:
            stats = stream(tensors, layout, sender, group, self._timeout_s)
        except BroadcastFailed as error:
            sender.destroy()  # otherwise the engines would wait for the rest until their deadline
            self._control.report(group.version, error)
        else:
            self._finished = sender
            self._control.report(group.version, stats)
        finally:
            # Gathering is a collective operation: every rank must gather every layer, also when sending has failed.
            for _ in tensors:
                pass


def stream(
    tensors: Iterator[tuple[str, torch.Tensor]],
    layout: Layout,
    sender: Sender,
    group: BroadcastGroup,
    timeout_s: float,
) -> BroadcastStats:
    """Waits for the receivers and sends them the weights; each of the two phases may last `timeout_s`.

    Raises:
        BroadcastFailed: a phase failed.
    """
    started = time.monotonic()
    named_errors = _PhaseErrors(sender, group.version)
    named_errors.form(group.names, timeout_s)
    formed = time.monotonic()
    sender.begin(timeout_s)
    send(tensors, layout, named_errors, sender.device)
    return BroadcastStats(formed - started, time.monotonic() - formed, layout.bytes)


class _StoreSender:
    """What the two senders share: rank 0 of the group that `join` forms, and the store where its ranks meet."""

    join: ClassVar[type[GlooGroup] | type[NcclGroup]]
    device: torch.device

    def __init__(self, timeout_s: float) -> None:
        self._store = open_store(timeout_s)
        self._group: GlooGroup | NcclGroup | None = None
        self.port: int = self._store.port

    def form(self, names: list[str], timeout_s: float) -> None:
        """Waits until the other ranks have joined. Raises TimeoutError with the owners of those that have not."""
        try:
            self._group = self.join(self._store, 0, len(names), timeout_s)
        except RuntimeError as error:
            if late := sorted({names[rank] for rank in missing_ranks(self._store, len(names)) if rank}):
                raise TimeoutError(f"{', '.join(late)} did not join within {timeout_s:.0f} s") from error
            raise

    def begin(self, timeout_s: float) -> None:
        """Starts the clock of the next phase."""
        assert self._group is not None
        self._group.restart_clock(timeout_s)

    def broadcast(self, bucket: torch.Tensor) -> Wait:
        """Starts to send a bucket."""
        assert self._group is not None
        return self._group.broadcast(bucket)

    def destroy(self) -> None:
        """Ends the group and closes the store."""
        if self._group is not None:
            self._group.destroy()
        self._group = self._store = None


class GlooSender(_StoreSender):
    """The sender without GPUs."""

    join, device = GlooGroup, torch.device("cpu")


class NcclSender(_StoreSender):
    """The sender on GPUs: vLLM's communicator, which its engines expect. Needs vLLM in the train workers."""

    join = NcclGroup

    def __init__(self, timeout_s: float) -> None:
        super().__init__(timeout_s)
        self.device = torch.device("cuda", torch.cuda.current_device())


class _PhaseErrors:
    """Raises the errors of a sender as BroadcastFailed. Errors of the source of the weights stay as they are."""

    def __init__(self, sender: Sender, version: int) -> None:
        self._sender, self._version = sender, version

    def form(self, names: list[str], timeout_s: float) -> None:
        try:
            self._sender.form(names, timeout_s)
        except Exception as error:
            raise self._failure("rendezvous", error) from error

    def broadcast(self, bucket: torch.Tensor) -> Wait:
        try:
            wait = self._sender.broadcast(bucket)
        except Exception as error:
            raise self._failure("fetch", error) from error

        def wait_with_named_errors() -> None:
            try:
                wait()
            except Exception as error:
                raise self._failure("fetch", error) from error

        return wait_with_named_errors

    def _failure(self, phase: str, error: Exception) -> BroadcastFailed:
        reason = first_line(error)
        return BroadcastFailed(f"the stream of version {self._version} failed in phase {phase!r}: {reason}")
