"""The group of a meeting without GPUs: gloo over TCP, apart from the process groups that training or vLLM have.

Invariant: nothing waits longer than the group's deadline; an end that is lost fails the others' operations at once or,
at the latest, then.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import BroadcastOptions, PrefixStore, ProcessGroupGloo

from aft_ray.weights.broadcast.buckets import Wait


def open_store(timeout_s: float) -> Any:
    """Rank 0's store, on a free port of this machine (`.port`)."""
    # libuv's server would not end with its object on some versions; vLLM leaves it out for the same reason.
    return TCPStore(
        "0.0.0.0", 0, is_master=True, timeout=timedelta(seconds=timeout_s), wait_for_workers=False, use_libuv=False
    )


def reach_store(address: str, port: int, timeout_s: float) -> Any:
    """The other ranks' way to the store."""
    return TCPStore(
        address, port, is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False, use_libuv=False
    )


class _Operation:
    def __init__(self, work: Any) -> None:
        self.work = work

    def wait(self, timeout: timedelta) -> None:
        self.work.wait(timeout)
        self.work = None


class GlooGroup:
    """`world_size` ranks that share a store. Buckets are CPU tensors."""

    def __init__(self, store: Any, rank: int, world_size: int, timeout_s: float) -> None:
        """Blocks until every rank is here. Raises RuntimeError, or torch's DistError, which is one."""
        self._store = store  # rank 0 serves it: it must live as long as the group forms anywhere
        self._operations: list[_Operation] = []
        self._deadline = time.monotonic() + timeout_s
        store.set(_arrival(rank), b"1")
        store.wait([_arrival(other) for other in range(world_size)], timedelta(seconds=timeout_s))
        prefixed = PrefixStore("gloo", store)
        self._group: Any = ProcessGroupGloo(prefixed, rank, world_size, self._left())

    def restart_clock(self, timeout_s: float) -> None:
        """The next phase begins: its deadline is `timeout_s` from now."""
        self._deadline = time.monotonic() + timeout_s

    def broadcast(self, bucket: torch.Tensor) -> Wait:
        options = BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = 0, 0, self._left()
        operation = _Operation(self._group.broadcast([bucket], options))
        self._operations = [one for one in self._operations if one.work is not None] + [operation]
        return lambda: operation.wait(self._left())

    def destroy(self) -> None:
        """Ends the group at once; operations of others that wait for this end fail."""
        # Whoever holds an operation, a traceback for instance, would keep its connections open.
        for operation in self._operations:
            operation.work = None
        self._operations = []
        self._group = self._store = None

    def _left(self) -> timedelta:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the deadline has passed")
        return timedelta(seconds=left)


def missing(store: Any, world_size: int) -> list[int]:
    """The ranks that have not come to the store yet."""
    return [rank for rank in range(world_size) if not store.check([_arrival(rank)])]


def _arrival(rank: int) -> str:
    return f"arrived/{rank}"
