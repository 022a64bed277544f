"""Train worker 0's end of a meeting: opens the table, waits for the engines, streams the live weights to them.

Invariants: whatever fails on the way (an engine that does not come, or dies) is a BroadcastFailed within the deadline of
its phase; the weights are read, never changed.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from aft_ray.coordination.broadcast_group import BroadcastFailed, BroadcastGroup
from aft_ray.weights.broadcast.buckets import ProcessGroup, Wait, send
from aft_ray.weights.broadcast.gloo_group import GlooGroup, missing, open_store
from aft_ray.weights.broadcast.layout import Layout


class Sender(ProcessGroup, Protocol):
    """Rank 0 of a group that forms around it."""

    port: int
    device: torch.device

    def form(self, names: list[str], timeout_s: float) -> None:
        """Waits for the others; `names` says whose process each rank is."""
        ...

    def begin(self, timeout_s: float) -> None:
        """The stream begins; it is to be through within `timeout_s`."""
        ...

    def destroy(self) -> None: ...


class GlooSender:
    """Without GPUs."""

    device = torch.device("cpu")

    def __init__(self, timeout_s: float) -> None:
        self._store = open_store(timeout_s)
        self._group: GlooGroup | None = None
        self.port: int = self._store.port

    def form(self, names: list[str], timeout_s: float) -> None:
        try:
            self._group = GlooGroup(self._store, 0, len(names), timeout_s)
        except RuntimeError as error:
            if late := sorted({names[rank] for rank in missing(self._store, len(names)) if rank}):
                raise TimeoutError(f"{', '.join(late)} did not come within {timeout_s:.0f} s") from error
            raise

    def begin(self, timeout_s: float) -> None:
        assert self._group is not None
        self._group.restart_clock(timeout_s)

    def broadcast(self, bucket: torch.Tensor) -> Wait:
        assert self._group is not None
        return self._group.broadcast(bucket)

    def destroy(self) -> None:
        if self._group is not None:
            self._group.destroy()
        self._group = self._store = None


class NcclSender:
    """On GPUs: vLLM's communicator, as its own NCCL engines expect. Needs vLLM in the train workers."""

    def __init__(self, timeout_s: float) -> None:
        del timeout_s
        self.device = torch.device("cuda", torch.cuda.current_device())
        with socket.socket() as probe:  # vLLM opens the store itself, on a port that it is given
            probe.bind(("", 0))
            self.port = probe.getsockname()[1]
        self._stream: Any = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._communicator: Any = None
        self._deadline = 0.0

    def form(self, names: list[str], timeout_s: float) -> None:
        from vllm.distributed.weight_transfer.nccl_common import stateless_init_process_group

        results: list[Any] = []

        def join() -> None:
            try:
                results.append(stateless_init_process_group("0.0.0.0", self.port, 0, len(names), self.device.index))
            except Exception as error:
                results.append(error)

        # NCCL waits for its peers without a deadline.
        thread = threading.Thread(target=join, daemon=True)
        thread.start()
        thread.join(timeout_s)
        if not results:
            raise TimeoutError(f"of {', '.join(sorted(set(names[1:])))} not all came within {timeout_s:.0f} s")
        if isinstance(results[0], Exception):
            raise results[0]
        self._communicator = results[0]

    def begin(self, timeout_s: float) -> None:
        self._deadline = time.monotonic() + timeout_s

    def broadcast(self, bucket: torch.Tensor) -> Wait:
        # The bucket is filled on the current stream, and travels on one of its own.
        self._stream.wait_stream(torch.cuda.current_stream())
        self._communicator.broadcast(bucket, src=0, stream=self._stream)
        through: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        through.record(self._stream)

        def wait() -> None:
            while not through.query():
                if time.monotonic() > self._deadline:
                    raise TimeoutError("the deadline has passed")
                time.sleep(0.0005)

        return wait

    def destroy(self) -> None:
        if self._communicator is not None:
            self._communicator.destroy()
            self._communicator = None


@dataclass(frozen=True, slots=True)
class BroadcastStats:
    """How a stream went: seconds until all were there, and until the last bucket was through."""

    rendezvous_s: float
    stream_s: float
    bytes: int


def stream(
    tensors: Iterator[tuple[str, torch.Tensor]],
    layout: Layout,
    hub: Sender,
    invitation: BroadcastGroup,
    timeout_s: float,
) -> BroadcastStats:
    """Waits for the guests at the hub and sends them the weights. Raises BroadcastFailed, naming version and phase."""
    began = time.monotonic()
    with_phase = _Guard(hub, invitation.version)
    with_phase.form(invitation.names, timeout_s)
    formed = time.monotonic()
    hub.begin(timeout_s)
    send(tensors, layout, with_phase, hub.device)
    return BroadcastStats(formed - began, time.monotonic() - formed, layout.bytes)


class _Guard:
    """A hub whose failures are BroadcastFailed; those of the weights' own source stay what they are."""

    def __init__(self, hub: Sender, version: int) -> None:
        self._hub, self._version = hub, version

    def form(self, names: list[str], timeout_s: float) -> None:
        try:
            self._hub.form(names, timeout_s)
        except Exception as error:
            raise self._failed("rendezvous", error) from error

    def broadcast(self, bucket: torch.Tensor) -> Wait:
        try:
            wait = self._hub.broadcast(bucket)
        except Exception as error:
            raise self._failed("fetch", error) from error

        def guarded() -> None:
            try:
                wait()
            except Exception as error:
                raise self._failed("fetch", error) from error

        return guarded

    def _failed(self, phase: str, error: Exception) -> BroadcastFailed:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        return BroadcastFailed(f"the stream of version {self._version} failed in phase {phase!r}: {reason}")
