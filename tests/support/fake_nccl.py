"""CUDA streams and vLLM's NCCL communicator without GPUs, for tests of code that uses them.

They are fakes only for the hardware that is missing: a stream is a thread that runs what is put on it in order and
late, and a communicator sends over gloo. As with NCCL, an operation whose peer is gone never ends, until the
communicator is destroyed, and then it ends without an error.
"""

import contextlib
import queue
import threading
import time
from datetime import timedelta

import torch
from torch.distributed.distributed_c10d import BroadcastOptions, PrefixStore, ProcessGroupGloo

# Seconds by which an operation starts later than it was put on its stream, so that one that does not wait is seen.
LATE_S = 0.002
# Seconds until gloo ends an operation whose peer is gone, so that its threads do not outlive the tests by much.
GLOO_S = 4


class Journal:
    """What was done with streams, in order: (thread, what, names of streams)."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, str, tuple[str, ...]]] = []

    def write(self, what, *streams) -> None:
        self.entries.append((threading.get_ident(), what, tuple(stream.name for stream in streams)))

    def of(self, thread) -> list[tuple[str, tuple[str, ...]]]:
        return [(what, streams) for one, what, streams in self.entries if one == thread]


JOURNAL = Journal()
_here = threading.local()


class FakeStream:
    """A CUDA stream. Work is put on it by `put`."""

    def __init__(self, device=None) -> None:
        self.name = f"stream {id(self)}"
        self._work: queue.Queue = queue.Queue()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            self._work.get()()

    def put(self, work) -> None:
        self._work.put(work)

    def wait_stream(self, other) -> None:
        JOURNAL.write("wait_stream", self, other)
        self.put(FakeEvent().recorded(other).done.wait)

    def wait_event(self, event) -> None:
        JOURNAL.write("wait_event", self, event.stream)
        self.put(event.done.wait)

    def synchronize(self) -> None:
        FakeEvent().recorded(self).done.wait()


class FakeEvent:
    """A CUDA event."""

    def __init__(self) -> None:
        self.done, self.stream = threading.Event(), None

    def recorded(self, stream):
        self.stream = stream
        stream.put(self.done.set)
        return self

    def record(self, stream) -> None:
        self.recorded(stream)

    def query(self) -> bool:
        return self.done.is_set()


def current_stream(device=None) -> FakeStream:
    """The stream of this thread. What a test computes is computed at once, so that nothing is ever waiting on it."""
    if not hasattr(_here, "stream"):
        _here.stream = FakeStream()
    return _here.stream


@contextlib.contextmanager
def on_stream(stream):
    before = current_stream()
    _here.stream = stream
    try:
        yield
    finally:
        _here.stream = before


class FakeCommunicator:
    """vLLM's `PyNcclCommunicator` over gloo. The ranks meet in the store of `members`, vLLM's own class."""

    def __init__(self, members, device) -> None:
        self.rank, self._destroyed = members.rank, threading.Event()
        store = PrefixStore("nccl", members.store)
        self._gloo = ProcessGroupGloo(store, members.rank, members.world_size, timedelta(seconds=GLOO_S))

    def broadcast(self, tensor, src, stream=None) -> None:
        stream = stream or current_stream()
        JOURNAL.write("broadcast", stream)
        ended = FakeEvent()
        stream.put(lambda: self._copy(tensor, src))
        ended.record(stream)
        if self.rank != src:
            # A GPU would run what reads the tensor after this on the same stream. Here it is read at once.
            ended.done.wait()

    def _copy(self, tensor, src) -> None:
        time.sleep(LATE_S)
        options = BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = src, 0, timedelta(seconds=GLOO_S)
        with contextlib.suppress(RuntimeError):
            work = self._gloo.broadcast([tensor], options)
            while not work.is_completed() and not self._destroyed.is_set():
                time.sleep(0.0005)
            if work.is_completed():
                work.wait()  # raises the error of an operation that has failed
                return
        self._destroyed.wait()

    def destroy(self) -> None:
        self._destroyed.set()


def install(monkeypatch) -> None:
    """Puts the fakes in the place of CUDA and of vLLM's communicator, for one test."""
    from vllm.distributed.weight_transfer import packed_tensor

    from aft_ray.weights.broadcast import nccl_group

    # vLLM keeps the streams of a process. The processes of a test are threads, each with streams of its own.
    monkeypatch.setattr(packed_tensor, "_get_streams", packed_tensor._get_streams.__wrapped__)
    JOURNAL.entries.clear()
    for module, name, fake in [
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "device", lambda device: contextlib.nullcontext()),
        (torch.cuda, "Stream", FakeStream),
        (torch.cuda, "Event", FakeEvent),
        (torch.cuda, "current_stream", current_stream),
        (torch.cuda, "stream", on_stream),
        (torch.accelerator, "current_device_index", lambda: 0),
        (torch.accelerator, "current_stream", current_stream),
        (torch.accelerator, "synchronize", lambda: None),
        (torch, "Event", FakeEvent),
        (torch.Tensor, "record_stream", lambda tensor, stream: None),
        (nccl_group, "nccl_communicator", FakeCommunicator),
    ]:
        monkeypatch.setattr(module, name, fake)
