"""The real engine in a weight broadcast: it receives the trainer's live weights, and outlives a broken broadcast."""

import shutil
import socket
import threading
import time
from dataclasses import replace

import pytest
import torch
from publications import deliver
from tiny import LENGTH
from transformers import AutoModelForCausalLM

from aft_ray.coordination.broadcast_group import BroadcastGroup, Receiver
from aft_ray.inference.engine import Engine
from aft_ray.inference.engine_spec import EngineSpec
from aft_ray.inference.update_phases import PhaseTimeout, UpdatePhases
from aft_ray.inference.versioned_engine import WeightTransferFailed
from aft_ray.storage.directories import DirectoryStore
from aft_ray.weights.broadcast.sender import Broadcast, BroadcastFailed, GlooSender, stream
from aft_ray.weights.export import layout_of, live_parameters
from aft_ray.weights.receive_plan import BroadcastOffer, FromBroadcast, FromDirectory
from jobs.tiny_model import build_tiny_model

DEADLINE = 120
PROMPT, RESPONSE = [7, 8, 9, 10, 11, 12], [9, 10, 1]
RECEIVERS = (Receiver("sampler 0", 1),)


def changed(directory, factor):
    """The model in a directory with other weights, as a trainer holds it."""
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(factor)
    return model


def score(model) -> float:
    with torch.no_grad():
        logprobs = model(torch.tensor([PROMPT + RESPONSE])).logits[0].log_softmax(-1)
    return sum(logprobs[len(PROMPT) + i - 1, token].item() for i, token in enumerate(RESPONSE)) / len(RESPONSE)


@pytest.fixture(scope="module", params=["tied", "untied"])
def directory(request, tiny_model, untied_model):
    return tiny_model if request.param == "tied" else untied_model


@pytest.fixture(scope="module")
def engine(directory):
    spec = EngineSpec(
        str(directory), (1,), "float32", LENGTH, 32, gpu=False, kv_cache_gib=0.25, receives_broadcasts=True
    )
    engine = Engine(spec)
    yield engine
    engine.close()


def broadcast(engine, model, tensors=None, bucket_bytes=30_000, timeout_s=60.0):
    """A broadcast from this process, as the trainer, to its engine; returns how it ended for the trainer."""
    layout = layout_of(model, torch.float32, bucket_bytes)
    sender, results = GlooSender(timeout_s), []
    group = BroadcastGroup(1, RECEIVERS)

    def trainer() -> None:
        try:
            results.append(stream(tensors or live_parameters(model), layout, sender, group, timeout_s))
        except BroadcastFailed as error:
            results.append(error)
        except ConnectionAbortedError:  # raised by the source of the weights
            sender.destroy()

    sending = threading.Thread(target=trainer)
    sending.start()
    plan = FromBroadcast(BroadcastOffer("127.0.0.1", sender.port, layout), group.first_ranks[0], group.world_size)
    try:
        engine.update_weights(plan.calls(timeout_s), lambda phase: None).result(DEADLINE)
    finally:
        sending.join(DEADLINE)
        sender.destroy()
    return results[0]


def test_an_engine_has_the_trainers_weights_after_a_broadcast(engine, directory):
    for factor in (3.0, 1.5):
        model = changed(directory, factor)
        before = score(model)
        streamed = broadcast(engine, model)
        assert engine.score(PROMPT, RESPONSE).result(DEADLINE) == pytest.approx(before, abs=1e-5)
        assert streamed.bytes == sum(parameter.nbytes for parameter in model.parameters())
        assert score(model) == before  # the trainer's are untouched


def test_an_engine_whose_broadcast_broke_off_takes_the_next_update(engine, directory):
    model, sent = changed(directory, 2.0), 0

    def breaking():
        nonlocal sent
        for pair in live_parameters(model):
            sent += 1
            if sent > 6:  # in the middle of a layer
                raise ConnectionAbortedError
            yield pair

    with pytest.raises(WeightTransferFailed):
        broadcast(engine, model, breaking(), bucket_bytes=1)
    assert engine.alive()
    shards = tuple(path.name for path in directory.glob("*.safetensors"))
    calls = FromDirectory(str(directory), shards).calls(DEADLINE)
    engine.update_weights(calls, lambda phase: None).result(DEADLINE)
    assert engine.score(PROMPT, RESPONSE).result(DEADLINE) == pytest.approx(score(changed(directory, 1.0)), abs=1e-5)
    broadcast(engine, model)
    assert engine.score(PROMPT, RESPONSE).result(DEADLINE) == pytest.approx(score(model), abs=1e-5)


def test_a_trainer_that_never_joins_fails_the_update_within_the_deadline(engine, directory):
    model = changed(directory, 1.0)
    sender, began = GlooSender(60), time.monotonic()
    plan = FromBroadcast(BroadcastOffer("127.0.0.1", sender.port, layout_of(model, torch.float32, 1000)), 1, 2)
    phases = []
    with pytest.raises(WeightTransferFailed):
        engine.update_weights(plan.calls(2), phases.append).result(DEADLINE)
    assert time.monotonic() - began < 30
    assert phases == ["fetch", "rendezvous"]
    assert engine.alive()
    sender.destroy()
    broadcast(engine, model)
    assert engine.score(PROMPT, RESPONSE).result(DEADLINE) == pytest.approx(score(model), abs=1e-5)


def test_the_number_of_remote_calls_does_not_grow_with_the_model(tmp_path):
    made = []
    for layers in (1, 4):
        model = changed(build_tiny_model(tmp_path / str(layers), 0, 64, layers, 2, True, LENGTH), 1.0)
        layout = layout_of(model, torch.float32, 1000)
        assert len(layout.names) > 9 * layers
        made.append([call.method for call in FromBroadcast(BroadcastOffer("a", 1, layout), 1, 2).calls(1)])
    assert made[0] == made[1]
    assert len(made[0]) == 6


class Control:
    """Answers the trainer as a driver would that announces one group."""

    address = "127.0.0.1"

    def __init__(self, group) -> None:
        self.group, self.results = group, []

    def is_requested(self, version):
        return True

    def wait_group(self, version):
        return self.group

    def report(self, version, result):
        self.results.append(result)


def test_a_trainer_whose_engines_do_not_join_continues_and_reports_why(tiny_model, tmp_path):
    model = changed(tiny_model, 1.0)
    control = Control(BroadcastGroup(4, RECEIVERS))
    began = time.monotonic()
    deliver_version_4(control, model, tmp_path)
    assert time.monotonic() - began < 10
    assert str(control.results[0]) == (
        "the stream of version 4 failed in phase 'rendezvous': sampler 0 did not join within 1 s"
    )
    for no_receivers in (None, replace(control.group, receivers=())):
        control = Control(no_receivers)
        port = deliver_version_4(control, model, tmp_path)
        assert control.results == []
        with pytest.raises(ConnectionRefusedError):  # nobody waits at a store that is not used
            socket.create_connection(("127.0.0.1", port), timeout=5)


def deliver_version_4(control, model, directory) -> int:
    """Delivers version 4, whose directory is written whether engines join or not; returns the port that was offered."""
    (manifest,) = deliver(Broadcast(control, 1 << 20, 1.0, gpu=False), model, directory / "model", 4)
    assert not manifest.durable
    assert sorted(path.name for path in (directory / "model").glob("*.safetensors")) == list(manifest.shards)
    assert DirectoryStore(directory / "model").verify_manifest("") == []
    shutil.rmtree(directory / "model")
    return manifest.broadcast.port


def test_a_phase_that_does_not_end_is_named(monkeypatch):
    import asyncio
    from concurrent.futures import Future

    from aft_ray.inference import update_phases as module

    monkeypatch.setattr(module, "GRACE_S", 0.1)
    phases = UpdatePhases()
    phases.enter("fetch")
    phases.enter("load")
    with pytest.raises(PhaseTimeout, match="phase 'load' did not end within 0 s"):
        asyncio.run(phases.watch(Future(), 0.2))
