"""The process group of a weight broadcast without GPUs: gloo over TCP.

It is independent of the process groups of training and of vLLM. Invariant: no operation lasts longer than the deadline
of its phase; when a rank is lost, the operations of the others fail at once or, at the latest, at that deadline.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
from torch.distributed.distributed_c10d import BroadcastOptions, PrefixStore, ProcessGroupGloo

from aft_ray.weights.broadcast.buckets import Wait
from aft_ray.weights.broadcast.rendezvous import arrive


class _Operation:
    """A running operation of the group; `work` is torch's Work, None when it has ended."""

    def __init__(self, work: Any) -> None:
        self.work = work

    def wait(self, timeout: timedelta) -> None:
        self.work.wait(timeout)
        self.work = None


class GlooGroup:
    """A process group of `world_size` ranks that share a store. Buckets are CPU tensors."""

    def __init__(self, store: Any, rank: int, world_size: int, timeout_s: float) -> None:
        """Blocks until every rank has joined. Raises RuntimeError (torch's DistError is one) when one does not."""
        self._store = store  # rank 0 serves it: it must live until every rank has formed the group
        self._operations: list[_Operation] = []
        self._deadline = time.monotonic() + timeout_s
        arrive(store, rank, world_size, timeout_s)
        prefixed = PrefixStore("gloo", store)
        self._group: Any = ProcessGroupGloo(prefixed, rank, world_size, self._time_left())

    def restart_clock(self, timeout_s: float) -> None:
        """Sets the deadline of the next phase: `timeout_s` from now."""
        self._deadline = time.monotonic() + timeout_s

    def broadcast(self, bucket: torch.Tensor) -> Wait:
        """Starts to copy rank 0's bucket into this rank's; see `buckets.ProcessGroup`."""
        options = BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = 0, 0, self._time_left()
        operation = _Operation(self._group.broadcast([bucket], options))
        self._operations = [one for one in self._operations if one.work is not None] + [operation]
        return lambda: operation.wait(self._time_left())

    def destroy(self) -> None:
        """Leaves the group at once; operations of other ranks that wait for this one fail."""
        # An operation that anything still holds, for instance a traceback, would keep the connections open.
        for operation in self._operations:
            operation.work = None
        self._operations = []
        self._group = self._store = None

    def _time_left(self) -> timedelta:
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the deadline has passed")
        return timedelta(seconds=left_s)
