"""What is sent in buckets is what is received, in order, and neither end holds more than two buckets."""

import math
import os
import queue
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from aft_ray.coordination.broadcast_group import BroadcastGroup, Receiver
from aft_ray.weights.broadcast.buckets import DIGESTS, Layout, receive, send
from aft_ray.weights.broadcast.sender import BroadcastFailed, GlooSender, stream
from aft_ray.weights.digests import tensor_digest

CPU = torch.device("cpu")
DTYPES = ("float32", "bfloat16", "float16")


class Pipe:
    """Both ranks of a process group in one process. What rank 0 sends is copied at once and may be overwritten then."""

    def __init__(self) -> None:
        self.sent: queue.Queue[torch.Tensor] = queue.Queue()
        self.sizes: list[int] = []

    def sender(self):
        def broadcast(bucket):
            self.sizes.append(bucket.numel())
            self.sent.put(bucket.clone())
            return lambda: None

        return _Rank(broadcast)

    def receiver(self):
        def broadcast(bucket):
            def wait():
                arrived = self.sent.get_nowait()
                assert arrived.numel() == bucket.numel()
                bucket.copy_(arrived)

            return wait

        return _Rank(broadcast)


class _Rank:
    def __init__(self, broadcast) -> None:
        self.broadcast = broadcast


shapes = st.lists(st.lists(st.integers(0, 9), max_size=3), max_size=12)


@settings(deadline=None, max_examples=150)
@given(shapes=shapes, source=st.sampled_from(DTYPES), dtype=st.sampled_from(DTYPES), bucket=st.integers(1, 3000))
def test_what_is_sent_is_received_in_order_and_in_the_layouts_dtype(shapes, source, dtype, bucket):
    tensors = [(f"w{i}", torch.randn(shape).to(getattr(torch, source))) for i, shape in enumerate(shapes)]
    layout = Layout.of([name for name, _ in tensors], shapes, dtype, bucket)
    pipe, out = Pipe(), []
    send(iter(tensors), layout, pipe.sender(), CPU)
    receive(layout, pipe.receiver(), out.extend, CPU)
    if tensors:
        name, digests = out.pop()
        assert name == DIGESTS
        assert digests.view(torch.int64).tolist() == [tensor_digest(tensor) for _, tensor in out]
    assert [name for name, _ in out] == [name for name, _ in tensors]
    for (_, before), (_, after) in zip(tensors, out, strict=True):
        assert after.dtype == getattr(torch, dtype)
        assert torch.equal(after, before.to(after.dtype))
    assert sum(pipe.sizes) == layout.bytes + 8 * len(tensors)
    assert max(pipe.sizes, default=0) <= max(bucket, max(layout.sizes, default=0))


@settings(deadline=None, max_examples=150)
@given(shapes=shapes, bucket=st.integers(1, 3000))
def test_buckets_end_where_vllm_ends_them(shapes, bucket):
    """vLLM's packed consumer goes on until the size is above the threshold; the last bucket is what is left."""
    layout = Layout.of([f"w{i}" for i in range(len(shapes))], shapes, "float32", bucket)
    expected, present, size = [], [], 0
    sizes = [math.prod(shape) * 4 for shape in shapes] + ([8 * len(shapes)] if shapes else [])
    for index, length in enumerate(sizes):
        present.append(index)
        size += length
        if size > layout.threshold:
            expected.append(present)
            present, size = [], 0
    assert layout.buckets() == expected + ([present] if present else [])


def test_weights_that_are_not_those_announced_are_refused_by_name():
    layout = Layout.of(["a", "b"], [(2,), (3,)], "float32", 1 << 20)
    for wrong in ([("a", torch.ones(2)), ("c", torch.ones(3))], [("a", torch.ones(2)), ("b", torch.ones(4))], []):
        with pytest.raises(ValueError, match=r"was announced, and"):
            send(iter(wrong), layout, Pipe().sender(), CPU)


class Memory(TorchDispatchMode):
    """Measures the most bytes that tensors created inside it have held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        given = {arg.untyped_storage()._cdata for arg in args if isinstance(arg, torch.Tensor)}
        if isinstance(made, torch.Tensor) and made.untyped_storage()._cdata not in given:
            storage = made.untyped_storage()
            self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: one for key, one in self.live.items() if not one[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return made


@pytest.mark.parametrize("bucket", [1000, 2048, 8192])
def test_each_end_holds_two_buckets_and_the_receiver_one_layer(bucket):
    layer = 8 * 1024
    names, shapes = [f"w{i}" for i in range(64)], [(256,)] * 64  # eight a layer of 8 KiB
    layout = Layout.of(names, shapes, "float32", bucket)
    weights = [(name, torch.randn(256)) for name in names]
    pipe = Pipe()
    kept: list[torch.Tensor] = []

    def load(tensors):
        """Keeps tensors until their layer is complete, as vLLM does."""
        for name, tensor in tensors:
            if name == DIGESTS:
                continue
            kept.append(tensor)
            if len(kept) == 8:
                kept.clear()

    with Memory() as digesting:
        tensor_digest(weights[0][1])
    with Memory() as sending:
        # The copies in the pipe stand for the network's memory.
        sender = pipe.sender()
        send(iter(weights), layout, _Rank(lambda tensor: _outside(sending, sender.broadcast, tensor)), CPU)
    with Memory() as receiving:
        receive(layout, pipe.receiver(), load, CPU)
    largest = max(bucket, 1024)  # a tensor larger than a bucket travels alone
    digests = 64 * 8
    assert 0 < sending.peak <= 2 * largest + digesting.peak + 2 * digests
    assert 0 < receiving.peak <= 2 * largest + layer + digests
    with Memory() as naive:  # an end that holds all weights, to test the measurement itself
        held = [tensor.clone() for _, tensor in weights]
    assert naive.peak == layout.bytes == sum(tensor.nbytes for tensor in held)


def _outside(mode, function, tensor):
    with torch.utils._python_dispatch._disable_current_modes():
        return function(tensor)


# --- over gloo, between processes


def peer(port: int, rank: int, layout_args: str, *, dies: bool = False) -> subprocess.Popen:
    command = [
        sys.executable,
        str(Path(__file__).parents[2] / "support/gloo_peer.py"),
        str(port),
        str(rank),
        layout_args,
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, "dies" if dies else "lives"], env=environment, stdout=subprocess.PIPE, text=True)


def broadcast(names, shapes, bucket, timeout_s, dies=()):
    """A broadcast to two processes. Returns how it ended, what each process printed, and the seconds that took."""
    layout = Layout.of(names, shapes, "float32", bucket)
    sender = GlooSender(timeout_s)
    spec = ";".join([str(layout.threshold), *("x".join(map(str, shape)) for shape in shapes)])
    peers = [peer(sender.port, rank, spec, dies=rank in dies) for rank in (1, 2)]
    filled = [torch.full(shape, float(i)) for i, shape in enumerate(shapes)]
    tensors = zip(names, filled, strict=True)
    try:
        group = BroadcastGroup(3, (Receiver("sampler 0", 1), Receiver("sampler 1", 1)))
        result = stream(tensors, layout, sender, group, timeout_s)
    except BroadcastFailed as error:
        result = error
        sender.destroy()
    at = time.monotonic()
    try:
        printed = [process.communicate(timeout=60)[0].strip() for process in peers]
    finally:
        for process in peers:
            process.kill()
    return result, printed, time.monotonic() - at


def test_a_stream_over_gloo_reaches_every_process():
    shapes = [(64, 64), (64,), (300, 64), (64, 64)]
    result, printed, _ = broadcast(["a", "b", "c", "d"], shapes, 32 << 10, 60)
    assert result.bytes == sum(math.prod(shape) for shape in shapes) * 4
    assert printed == [f"received {[0.0, 1.0, 2.0, 3.0]}"] * 2


def test_a_process_that_dies_in_the_stream_fails_it_at_once_for_all():
    result, printed, seconds = broadcast([f"w{i}" for i in range(40)], [(512, 512)] * 40, 2 << 20, 60, dies=(2,))
    assert isinstance(result, BroadcastFailed)
    assert str(result).startswith("the stream of version 3 failed in phase 'fetch': ")
    assert printed[0].startswith("failed")
    assert seconds < 30  # long before the deadline


def test_a_process_that_never_joins_is_named_within_the_deadline():
    layout = Layout.of(["a"], [(4,)], "float32", 64)
    sender, began = GlooSender(2), time.monotonic()
    group = BroadcastGroup(7, (Receiver("sampler 0", 1), Receiver("sampler 1", 2)))
    with pytest.raises(
        BroadcastFailed, match=r"version 7 failed in phase 'rendezvous': sampler 0, sampler 1 did not join within 2 s"
    ):
        stream(iter([("a", torch.ones(4))]), layout, sender, group, 2)
    assert time.monotonic() - began < 10
