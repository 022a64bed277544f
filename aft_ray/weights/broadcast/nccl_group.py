"""The process group of a weight broadcast between GPUs: vLLM's NCCL communicator, with deadlines.

NCCL itself waits for ever for a rank that is gone: while the communicator forms, in the first operation, which may
still set up connections, and in a kernel on the GPU. Invariant: no call here lasts longer than the deadline of its
phase. A call that NCCL does not end by then is left behind in a thread of its own, which holds neither the store nor
its port; what it may still return later is destroyed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any, TypeVar

import torch

from aft_ray.cluster.compat import nccl_communicator, store_group
from aft_ray.weights.broadcast.buckets import Wait
from aft_ray.weights.broadcast.rendezvous import arrive

T = TypeVar("T")
# Seconds between two looks at whether a bucket is sent.
_POLL_S = 0.0005


class NcclGroup:
    """A process group of `world_size` ranks that share a store. Buckets are on this process's current GPU.

    Attributes:
        communicator: vLLM's `PyNcclCommunicator`, which its weight transfer engines use directly.
    """

    def __init__(self, store: Any, rank: int, world_size: int, timeout_s: float) -> None:
        """Blocks until every rank has joined.

        Raises:
            RuntimeError: a rank did not arrive at the store in time (torch's DistError is one), or NCCL failed.
            TimeoutError: all arrived, and NCCL did not connect them in time.
        """
        self._deadline = time.monotonic() + timeout_s
        self._device = torch.device("cuda", torch.cuda.current_device())
        arrive(store, rank, world_size, timeout_s)
        members = store_group(store, rank, world_size)
        try:
            self.communicator: Any = self._call(
                lambda: nccl_communicator(members, self._device.index), _destroy, "NCCL did not connect all ranks"
            )
        finally:
            members.store = None  # a thread that is left behind must not keep the port
        self._stream: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def restart_clock(self, timeout_s: float) -> None:
        """Sets the deadline of the next phase: `timeout_s` from now."""
        self._deadline = time.monotonic() + timeout_s

    def broadcast(self, bucket: torch.Tensor) -> Wait:
        """Starts to send a bucket, which the current CUDA stream has filled, on a CUDA stream of its own."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._call(
            lambda: self.communicator.broadcast(bucket, src=0, stream=self._stream),
            lambda _: None,
            "NCCL did not start to send a bucket",
        )
        sent: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        sent.record(self._stream)

        def wait() -> None:
            while not sent.query():
                if time.monotonic() > self._deadline:
                    raise TimeoutError("a bucket was not received by the deadline")
                time.sleep(_POLL_S)

        return wait

    def destroy(self) -> None:
        """Leaves the group at once. Operations on the GPU that wait for other ranks end."""
        communicator, self.communicator = self.communicator, None
        if communicator is not None:
            _destroy(communicator)

    def _call(self, function: Callable[[], T], discard: Callable[[T], None], failure: str) -> T:
        """Calls a function of NCCL; TimeoutError says `failure` when it does not return by the deadline."""

        def on_device() -> T:
            with torch.cuda.device(self._device):
                return function()

        return call_within(max(0.0, self._deadline - time.monotonic()), on_device, discard, failure)


def call_within(timeout_s: float, function: Callable[[], T], discard: Callable[[T], None], failure: str) -> T:
    """Calls a function in a thread of its own, and returns its value or raises its error.

    Args:
        discard: is given a value that comes too late.

    Raises:
        TimeoutError: says `failure`, when the function has not returned within `timeout_s`.
    """
    result: Future[T] = Future()

    def run(result: Future[T]) -> None:
        try:
            value = function()
        except BaseException as error:
            with suppress(InvalidStateError):  # nobody waits any more
                result.set_exception(error)
        else:
            try:
                result.set_result(value)
            except InvalidStateError:
                discard(value)
        finally:
            del result  # the error's traceback has this frame: together they would keep each other, and the store

    threading.Thread(target=run, args=(result,), daemon=True).start()
    try:
        return result.result(timeout_s)
    except TimeoutError:
        if result.cancel():
            raise TimeoutError(f"{failure} by the deadline") from None
        return result.result()  # it has just returned, or has raised a TimeoutError itself
    finally:
        del result


def _destroy(communicator: Any) -> None:
    communicator.destroy()
