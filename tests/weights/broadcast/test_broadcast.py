"""The real engine at a meeting: it takes the trainer's live weights, and goes on when a stream breaks off."""

import threading
import time
from dataclasses import replace

import pytest
import torch
from tiny import LENGTH
from transformers import AutoModelForCausalLM

from aft_ray.coordination.broadcast_group import (
    BroadcastFailed,
    BroadcastGroup,
    BroadcastMembership,
    Receiver,
    StoreAddress,
)
from aft_ray.inference.engine import Engine
from aft_ray.inference.engine_spec import EngineSpec
from aft_ray.inference.update_phases import PhaseTimeout, UpdatePhases
from aft_ray.inference.versioned_engine import WeightTransferFailed
from aft_ray.weights.broadcast.sender import GlooSender, stream
from aft_ray.weights.export import layout_of, live_parameters
from aft_ray.weights.publish import Broadcast
from aft_ray.weights.receive_plan import FromBroadcast, FromDirectory
from jobs.tiny_model import build_tiny_model

DEADLINE = 120
PROMPT, RESPONSE = [7, 8, 9, 10, 11, 12], [9, 10, 1]
GUESTS = (Receiver("sampler 0", 1),)


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
    spec = EngineSpec(str(directory), 1, "float32", LENGTH, 32, gpu=False, kv_cache_gib=0.25, joins_broadcast=True)
    engine = Engine(spec)
    yield engine
    engine.close()


def meet(engine, model, tensors=None, bucket_bytes=30_000, timeout_s=60.0):
    """A meeting of this process's trainer with its engine, until both are through; what the trainer says of it."""
    layout = layout_of(model, torch.float32, bucket_bytes)
    hub, ends = GlooSender(timeout_s), []
    invitation = BroadcastGroup(1, GUESTS)

    def trainer() -> None:
        try:
            ends.append(stream(tensors or live_parameters(model, True), layout, hub, invitation, timeout_s))
        except BroadcastFailed as error:
            ends.append(error)
        except ConnectionAbortedError:  # the source's own
            hub.destroy()

    sending = threading.Thread(target=trainer)
    sending.start()
    place = BroadcastMembership(
        StoreAddress("127.0.0.1", hub.port), invitation.first_ranks[0], invitation.world_size, layout
    )
    try:
        engine.update_weights(FromBroadcast(place).calls(timeout_s), lambda phase: None).result(DEADLINE)
    finally:
        sending.join(DEADLINE)
        hub.destroy()
    return ends[0]


def test_an_engine_at_a_meeting_has_the_trainers_weights(engine, directory):
    for factor in (3.0, 1.5):
        model = changed(directory, factor)
        before = score(model)
        streamed = meet(engine, model)
        assert engine.score(PROMPT, RESPONSE).result(DEADLINE) == pytest.approx(before, abs=1e-5)
        assert streamed.bytes == sum(parameter.nbytes for parameter in model.parameters())
        assert score(model) == before  # the trainer's are untouched


def test_an_engine_whose_stream_broke_off_takes_the_next_delivery(engine, directory):
    model, sent = changed(directory, 2.0), 0

    def breaking():
        nonlocal sent
        for pair in live_parameters(model, True):
            sent += 1
            if sent > 6:  # in the middle of a layer
                raise ConnectionAbortedError
            yield pair

    with pytest.raises(WeightTransferFailed):
        meet(engine, model, breaking(), bucket_bytes=1)
    assert engine.alive()
    shards = tuple(path.name for path in directory.glob("*.safetensors"))
    calls = FromDirectory(str(directory), shards).calls(DEADLINE)
    engine.update_weights(calls, lambda phase: None).result(DEADLINE)
    assert engine.score(PROMPT, RESPONSE).result(DEADLINE) == pytest.approx(score(changed(directory, 1.0)), abs=1e-5)
    meet(engine, model)
    assert engine.score(PROMPT, RESPONSE).result(DEADLINE) == pytest.approx(score(model), abs=1e-5)


def test_a_trainer_that_never_comes_is_missed_within_the_deadline(engine, directory):
    model = changed(directory, 1.0)
    hub, began = GlooSender(60), time.monotonic()
    place = BroadcastMembership(StoreAddress("127.0.0.1", hub.port), 1, 2, layout_of(model, torch.float32, 1000))
    phases = []
    with pytest.raises(WeightTransferFailed):
        engine.update_weights(FromBroadcast(place).calls(2), phases.append).result(DEADLINE)
    assert time.monotonic() - began < 30
    assert phases == ["fetch", "rendezvous"]
    assert engine.alive()
    hub.destroy()
    meet(engine, model)
    assert engine.score(PROMPT, RESPONSE).result(DEADLINE) == pytest.approx(score(model), abs=1e-5)


def test_the_number_of_remote_calls_does_not_grow_with_the_model(tmp_path):
    made = []
    for layers in (1, 4):
        model = changed(build_tiny_model(tmp_path / str(layers), 0, 64, layers, 2, True, LENGTH), 1.0)
        layout = layout_of(model, torch.float32, 1000)
        assert len(layout.names) > 9 * layers
        made.append(
            [call.method for call in FromBroadcast(BroadcastMembership(StoreAddress("a", 1), 1, 2, layout)).calls(1)]
        )
    assert made[0] == made[1]
    assert len(made[0]) == 5


class Told:
    """What the trainer learns of meetings and tells of them, without a board."""

    def __init__(self, invitation) -> None:
        self.given, self.ends, self.ports = invitation, [], []

    def invitation(self, version):
        return self.given

    def open_table(self, version, port):
        self.ports.append(port)

    def ended(self, version, how):
        self.ends.append(how)


def test_a_trainer_whom_nobody_meets_goes_on_and_says_why(tiny_model):
    model = changed(tiny_model, 1.0)
    told = Told(BroadcastGroup(4, GUESTS))
    began = time.monotonic()
    Broadcast(told, 0, torch.float32, 1 << 20, 1.0, gpu=False).deliver(model, 4)
    assert time.monotonic() - began < 10
    assert str(told.ends[0]) == (
        "the stream of version 4 failed in phase 'rendezvous': sampler 0 did not come within 1 s"
    )
    for nobody in (None, replace(told.given, guests=())):
        told = Told(nobody)
        Broadcast(told, 0, torch.float32, 1 << 20, 1.0, gpu=False).deliver(model, 4)
        assert told.ends == told.ports == []


def test_a_phase_that_stands_still_is_named(monkeypatch):
    import asyncio
    from concurrent.futures import Future

    from aft_ray.inference import update_phases as module

    monkeypatch.setattr(module, "GRACE_S", 0.1)
    phases = UpdatePhases()
    phases.enter("fetch")
    phases.enter("load")
    with pytest.raises(PhaseTimeout, match="phase 'load' did not end within 0 s"):
        asyncio.run(phases.watch(Future(), 0.2))
