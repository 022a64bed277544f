"""Our NCCL sender and vLLM's packed NCCL consumer: what arrives, in which order, and what happens when a peer is gone.

There is no GPU here: CUDA streams and NCCL are fakes (`support/fake_nccl.py`) with gloo under them. All else is real:
our sender, buckets and engine, and vLLM's engine and consumer. They are those of the CPU build. The same tests run
against the GPU build's where `make check-gpu` has unpacked it.
"""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import fake_nccl
import pytest
import torch
import vllm
import vllm.model_executor.model_loader.mtp_validation  # vLLM's engine imports it when it receives, which takes seconds
from gpu_build import needs_gpu_build, unpacked_vllm

from aft_ray.coordination.broadcast_group import BroadcastGroup, Receiver
from aft_ray.inference.vllm_worker import transfer_engines
from aft_ray.inference.vllm_worker.transfer_engines import NcclBroadcastEngine
from aft_ray.weights.broadcast import nccl_group
from aft_ray.weights.broadcast.buckets import Layout
from aft_ray.weights.broadcast.nccl_group import call_within
from aft_ray.weights.broadcast.sender import BroadcastFailed, NcclSender, stream
from aft_ray.weights.receive_plan import BroadcastOffer, FromBroadcast

CPU = torch.device("cpu")
WAIT_S, SHORT_S = 30.0, 1.0
GROUP = BroadcastGroup(5, (Receiver("sampler 0", 2), Receiver("sampler 1", 1)))
MIXED = [(3,), (7, 5), (1,), (129, 33), (2, 3, 4), (), (64,), (5000,), (9, 1)]  # odd sizes; one of 20 KB
RUNS_AGAINST_GPU_BUILD = unpacked_vllm() in Path(vllm.__file__).resolve().parents
ORDERED_CONSUMER = not vllm.__version__.startswith("0.32.")  # 0.32 does not order loads after earlier receives


@pytest.fixture(autouse=True)
def _fakes(monkeypatch):
    fake_nccl.install(monkeypatch)
    # The models here have no layers to be prepared and completed.
    monkeypatch.setattr(transfer_engines, "begin_reload", lambda model, config: None)
    monkeypatch.setattr(transfer_engines, "finish_reload", lambda model, config: "")


class Process:
    """A process of an engine, in a thread: vLLM's engine with our changes, and a model that keeps what it is given.

    Args:
        dies_at: the phase, or the number of the loaded bucket, at which it stops, as a process that is killed.
    """

    def __init__(self, first_rank, rank, dies_at=None) -> None:
        self.first_rank, self.dies_at, self.ended = first_rank, dies_at, None
        self.thread: threading.Thread | None = None
        config = SimpleNamespace(parallel_config=SimpleNamespace(rank=rank), model_config=None)
        self.engine = NcclBroadcastEngine(None, config, CPU, self)
        self.loaded, self.buckets = [], 0

    def load_weights(self, tensors) -> None:
        if self.dies_at == self.buckets:
            raise SystemExit
        self.buckets += 1
        fake_nccl.JOURNAL.write("load", fake_nccl.current_stream())
        self.loaded += tensors  # as vLLM does, which keeps them until a fused layer is complete

    def receive(self, offer, timeout_s) -> None:
        self.loaded, self.buckets, self.ended = [], 0, None

        def run() -> None:
            calls = {call.method: call.args for call in FromBroadcast(offer, self.first_rank, 4).calls(timeout_s)}
            try:
                if self.dies_at == "rendezvous":
                    return
                (init_info,) = calls["init_weight_transfer_engine"]
                self.engine.init_transfer_engine(self.engine.parse_init_info(init_info))
                if self.dies_at == "first bucket":
                    return
                self.engine.start_weight_update()
                self.engine.update_weights(*calls["update_weights"])
                self.engine.finish_weight_update()
                self.ended = self.engine.problem or "loaded"
            except Exception as error:
                self.ended = error
            except SystemExit:
                return
            finally:
                if self.dies_at is None:
                    self.engine.shutdown()

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()


def processes(**dies) -> list[Process]:
    return [Process(1, 0, dies.get("first")), Process(1, 1), Process(3, 0)]


def broadcast(tensors, layout, receivers, timeout_s=WAIT_S):
    """Sends the tensors to the processes. Returns how it ended for the trainer, and the seconds that took."""
    sender = NcclSender(timeout_s)
    sender.device = CPU
    for one in receivers:
        one.receive(BroadcastOffer("127.0.0.1", sender.port, layout), timeout_s)
    began = time.monotonic()
    try:
        result = stream(iter(tensors), layout, sender, GROUP, timeout_s)
    except BroadcastFailed as error:
        result = error
    seconds = time.monotonic() - began
    for one in receivers:
        one.thread.join(WAIT_S + 5)
        assert not one.thread.is_alive()
    sender.destroy()
    return result, seconds


def weights(shapes, dtype):
    return [(f"w{i}", torch.randn(shape).to(dtype)) for i, shape in enumerate(shapes)]


def assert_loaded(receivers, tensors):
    for one in receivers:
        assert one.ended == "loaded"
        assert [name for name, _ in one.loaded] == [name for name, _ in tensors]
        for (name, sent), (_, arrived) in zip(tensors, one.loaded, strict=True):
            assert arrived.dtype == sent.dtype
            assert torch.equal(arrived, sent), name


@pytest.mark.parametrize("bucket", [1, 1000, 24_000, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_process_of_every_engine_loads_what_was_sent(dtype, bucket):
    receivers = processes()
    for _ in range(2):  # each broadcast has a group of its own
        tensors = weights(MIXED, dtype)
        layout = Layout.of([name for name, _ in tensors], MIXED, str(dtype).removeprefix("torch."), bucket)
        result, _ = broadcast(tensors, layout, receivers)
        assert result.bytes == sum(tensor.nbytes for _, tensor in tensors)
        assert_loaded(receivers, tensors)
        assert {one.buckets for one in receivers} == {len(layout.buckets())}


def test_operations_on_streams_wait_for_what_they_read():
    shapes = [(300,)] * 12
    tensors, receivers = weights(shapes, torch.float32), processes()
    layout = Layout.of([name for name, _ in tensors], shapes, "float32", 3000)
    broadcast(tensors, layout, receivers)
    count = len(layout.buckets())
    assert count == 7  # the last one has the digests
    # The sender: each bucket is sent on the sender's stream, after that has waited for the stream that fills buckets.
    trainer = threading.get_ident()
    waits = [streams for what, streams in fake_nccl.JOURNAL.of(trainer) if what == "wait_stream"]
    assert waits == [(waits[0][0], fake_nccl.current_stream().name)] * count
    entries = [(what, streams[0]) for _, what, streams in fake_nccl.JOURNAL.entries if streams[0] == waits[0][0]]
    assert entries == [("wait_stream", waits[0][0]), ("broadcast", waits[0][0])] * count
    # An engine: a bucket is loaded on the stream on which it was received, after all that was received before.
    for one in receivers:
        entries = fake_nccl.JOURNAL.of(one.thread.ident)
        loads = [number for number, (what, _) in enumerate(entries) if what == "load"]
        assert len(loads) == count
        for previous, number in zip([-1, *loads], loads, strict=False):
            since = dict(entries[previous + 1 : number])
            assert since["broadcast"] == entries[number][1]
            if ORDERED_CONSUMER and previous >= 0:
                assert since["wait_event"] == (*entries[number][1], *entries[previous][1])


# Larger than what the network keeps of a bucket that nobody reads.
LARGE = [(1 << 22,)] * 5


@pytest.mark.parametrize(
    ("dies_at", "phase", "reason"),
    [
        ("rendezvous", "rendezvous", "sampler 0 did not join within 1 s"),
        ("first bucket", "fetch", "a bucket was not received by the deadline"),
        (0, "fetch", "a bucket was not received by the deadline"),
        (2, "fetch", "a bucket was not received by the deadline"),
        (3, "fetch", "a bucket was not received by the deadline"),
    ],
)
def test_a_peer_that_dies_costs_the_trainer_the_deadline_and_the_next_broadcast_works(dies_at, phase, reason):
    tensors = weights(LARGE, torch.bfloat16)
    layout = Layout.of([name for name, _ in tensors], LARGE, "bfloat16", 1)
    receivers = processes(first=dies_at)
    result, seconds = broadcast(tensors, layout, receivers, SHORT_S)
    assert str(result) == f"the stream of version 5 failed in phase {phase!r}: {reason}"
    assert seconds < 2 * SHORT_S + 2
    for one in receivers[1:]:
        assert isinstance(one.ended, (RuntimeError, TimeoutError))  # it can take the next update
    receivers[0] = Process(1, 0)
    again, _ = broadcast(tensors, layout, receivers)
    assert again.bytes == layout.bytes
    assert_loaded(receivers, tensors)


def test_engines_leave_a_trainer_that_dies_in_the_stream_by_their_deadline():
    tensors, receivers = weights(LARGE, torch.bfloat16), processes()
    layout = Layout.of([name for name, _ in tensors], LARGE, "bfloat16", 1)
    sender = NcclSender(SHORT_S)
    sender.device = CPU
    for one in receivers:
        one.receive(BroadcastOffer("127.0.0.1", sender.port, layout), SHORT_S)
    sender.form(GROUP.names, SHORT_S)
    for one in receivers:
        one.thread.join(WAIT_S)
        assert str(one.ended) == "not all weights arrived within 1 s"
    sender.destroy()
    broadcast(tensors, layout, receivers)
    assert_loaded(receivers, tensors)


def test_a_join_that_nccl_never_ends_is_left_behind_and_keeps_neither_port_nor_communicator(monkeypatch):
    """A rank dies between the store and NCCL, which then waits for it for ever."""
    ends, made = threading.Event(), []

    def hanging(members, device):
        made.append(SimpleNamespace(destroy=lambda: made.append("destroyed")))
        ends.wait(WAIT_S)
        return made[0]

    tensors = weights(MIXED, torch.float32)
    layout = Layout.of([name for name, _ in tensors], MIXED, "float32", 1000)
    sender, receivers = NcclSender(SHORT_S), processes()
    sender.device = CPU
    with monkeypatch.context() as patch:
        patch.setattr(nccl_group, "nccl_communicator", hanging)
        for one in receivers:
            one.receive(BroadcastOffer("127.0.0.1", sender.port, layout), SHORT_S)
        began = time.monotonic()
        with pytest.raises(BroadcastFailed, match="version 5 failed in phase 'rendezvous': NCCL did not connect all"):
            stream(iter(tensors), layout, sender, GROUP, SHORT_S)
        assert time.monotonic() - began < SHORT_S + 2
        for one in receivers:
            one.thread.join(WAIT_S)
            assert isinstance(one.ended, TimeoutError)
    port = sender.port
    sender.destroy()
    with socket.socket() as other:  # the port is free while the threads still wait
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("0.0.0.0", port))
    broadcast(tensors, layout, receivers)
    assert_loaded(receivers, tensors)
    ends.set()
    deadline = time.monotonic() + WAIT_S
    while made.count("destroyed") < 4:  # what the threads left behind still make: of the sender and three processes
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_operation_that_nccl_never_starts_ends_with_the_phase(monkeypatch):
    """NCCL may set up connections in its first operation, and waits for ever for a rank that is gone."""

    class Blocking(fake_nccl.FakeCommunicator):
        def broadcast(self, tensor, src, stream=None):
            if self.rank != src:
                return super().broadcast(tensor, src, stream)
            self._destroyed.wait()  # ncclCommAbort ends it
            raise RuntimeError("NCCL error: the communicator was aborted")

    monkeypatch.setattr(nccl_group, "nccl_communicator", Blocking)
    tensors = weights(MIXED, torch.float32)
    layout = Layout.of([name for name, _ in tensors], MIXED, "float32", 1000)
    result, seconds = broadcast(tensors, layout, processes(), SHORT_S)
    assert str(result) == (
        "the stream of version 5 failed in phase 'fetch': NCCL did not start to send a bucket by the deadline"
    )
    assert seconds < SHORT_S + 2


def test_a_call_within_a_deadline_raises_what_the_call_raises():
    def fails():
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        call_within(WAIT_S, fails, print, "late")
    assert call_within(WAIT_S, lambda: 7, print, "late") == 7


@needs_gpu_build
@pytest.mark.skipif(RUNS_AGAINST_GPU_BUILD, reason="these are the tests against the build for GPUs")
def test_the_gpu_builds_consumer_passes_the_same_tests():
    environment = os.environ | {"PYTHONPATH": str(unpacked_vllm())}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
