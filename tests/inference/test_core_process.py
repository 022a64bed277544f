"""vLLM's engine core in this process, as on CPUs, and in a process of its own, as on GPUs, does the same.

Every way in which new weights arrive, what is refused, and what fails. On GPUs there is one process less than here:
vLLM starts the worker of a CPU engine in a third process.
"""

import json
import multiprocessing
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from tiny import LENGTH
from transformers import AutoModelForCausalLM

from aft_ray.config.run import LoraConfig
from aft_ray.coordination.broadcast_group import BroadcastGroup, Receiver
from aft_ray.inference.engine import Engine, EngineDead
from aft_ray.inference.engine_spec import EngineSpec
from aft_ray.inference.request_parameters import Prompt, SamplingSpec
from aft_ray.inference.versioned_engine import WeightTransferFailed
from aft_ray.weights.adapter import ADAPTER_FILES
from aft_ray.weights.broadcast.sender import GlooSender, stream
from aft_ray.weights.export import layout_of, live_parameters
from aft_ray.weights.receive_plan import BroadcastOffer, FromAdapter, FromBroadcast, FromDirectory, FromObjects

DEADLINE = 120
# Seconds within which everything that waits must be told that the engine is dead.
NOTICE = 15
PROMPT, RESPONSE = [7, 8, 9, 10, 11, 12], [9, 10, 1]
FREE = SamplingSpec(k=4, temperature=1.0, top_p=1.0, max_tokens=20)
LONG = SamplingSpec(k=48, temperature=1.0, top_p=1.0, max_tokens=120)
TARGETS = ["q_proj", "v_proj", "down_proj"]


def start(model, own_process, **options) -> Engine:
    spec = EngineSpec(
        str(model), (1,), "float32", LENGTH, 64, gpu=False, kv_cache_gib=0.25, core_process=own_process, **options
    )
    return Engine(spec)


def processes() -> list[multiprocessing.process.BaseProcess]:
    return [child for child in multiprocessing.active_children() if child.name == "EngineCore"]


def ended(count: int) -> bool:
    """Whether fewer engine cores than `count` are left within seconds, or none for 0."""
    deadline = time.monotonic() + NOTICE
    while len(processes()) >= max(1, count) and time.monotonic() < deadline:
        time.sleep(0.1)
    return len(processes()) < max(1, count)


def score(model) -> float:
    with torch.no_grad():
        logprobs = model(torch.tensor([PROMPT + RESPONSE])).logits[0].log_softmax(-1)
    return sum(logprobs[len(PROMPT) + i - 1, token].item() for i, token in enumerate(RESPONSE)) / len(RESPONSE)


def changed(directory, factor, to=None):
    """The model in a directory with other weights; written to `to` if that is given."""
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(factor)
    if to is not None:
        model.save_pretrained(to)
    return model


def update(engine, plan, timeout_s=60.0, adapter=0) -> list[str]:
    """Makes a plan's calls; returns the phases that were entered."""
    phases: list[str] = []
    engine.update_weights(plan.calls(timeout_s), phases.append, adapter).result(DEADLINE)
    return phases


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["here", "own process"])
def own_process(request):
    return request.param


@pytest.fixture(scope="module")
def engine(own_process, untied_model):
    engine = start(untied_model, own_process, receives_broadcasts=True)
    assert len(processes()) == own_process
    yield engine
    engine.close()
    assert ended(own_process)


@pytest.fixture(scope="module")
def first_candidates():
    """What the engine in this process sampled first."""
    return []


def test_both_sample_the_same(engine, first_candidates):
    sampled = [c.token_ids for c in engine.sample(Prompt(PROMPT, 5), FREE).result(DEADLINE)]
    assert len(sampled) == 4
    assert sampled == (first_candidates or sampled)
    first_candidates[:] = sampled


def test_weights_arrive_from_a_directory(engine, untied_model, tmp_path):
    model = changed(untied_model, 2.0, tmp_path)
    phases = update(engine, FromDirectory(str(tmp_path), ("model.safetensors",)))
    assert phases == ["fetch", "load", "load", "load"]
    assert engine.score(PROMPT, RESPONSE).result(DEADLINE) == pytest.approx(score(model), abs=1e-5)


def test_weights_arrive_from_the_object_store(engine, untied_model, tmp_path, ray_here):
    import ray

    model = changed(untied_model, 2.5, tmp_path)
    shard = ray.put(np.fromfile(tmp_path / "model.safetensors", dtype=np.uint8))
    update(engine, FromObjects((shard,), FromDirectory("/nowhere", ("model.safetensors",))))
    assert engine.score(PROMPT, RESPONSE).result(DEADLINE) == pytest.approx(score(model), abs=1e-5)


def broadcast(engine, model, timeout_s=60.0) -> None:
    """Broadcasts the weights of a model from this process to its engine."""
    layout, sender = layout_of(model, torch.float32, 30_000), GlooSender(timeout_s)
    group = BroadcastGroup(1, (Receiver("sampler 0", 1),))
    sending = threading.Thread(target=stream, args=(live_parameters(model), layout, sender, group, timeout_s))
    sending.start()
    offer = BroadcastOffer("127.0.0.1", sender.port, layout)
    update(engine, FromBroadcast(offer, group.first_ranks[0], group.world_size), timeout_s)
    sending.join(DEADLINE)
    sender.destroy()


def test_weights_arrive_in_a_broadcast_also_after_one_whose_trainer_never_joined(engine, untied_model):
    model = changed(untied_model, 1.5)
    sender, began = GlooSender(60), time.monotonic()
    plan = FromBroadcast(BroadcastOffer("127.0.0.1", sender.port, layout_of(model, torch.float32, 1000)), 1, 2)
    with pytest.raises(WeightTransferFailed, match=r"^(?!.*(?:Worker failed|collective_rpc)).*(?i:timed? ?out|within)"):
        update(engine, plan, 2.0)
    assert time.monotonic() - began < 30
    sender.destroy()
    assert engine.alive()
    broadcast(engine, model)
    assert engine.score(PROMPT, RESPONSE).result(DEADLINE) == pytest.approx(score(model), abs=1e-5)


def test_an_engine_that_slept_answers_after_the_next_update(engine, untied_model, tmp_path):
    model = changed(untied_model, 3.0, tmp_path)
    engine.sleep().result(DEADLINE)
    assert engine.alive()
    update(engine, FromDirectory(str(tmp_path), ("model.safetensors",)))
    assert engine.score(PROMPT, RESPONSE).result(DEADLINE) == pytest.approx(score(model), abs=1e-5)
    assert len(engine.sample(Prompt(PROMPT, 1), FREE).result(DEADLINE)) == 4


def test_a_prompt_that_is_too_long_is_refused_and_the_engine_lives_on(engine):
    running = [engine.sample(Prompt(PROMPT, i), FREE) for i in range(4)]
    with pytest.raises(ValueError, match=r"length|tokens"):
        engine.score([5] * LENGTH, [6]).result(DEADLINE)
    assert all(len(future.result(DEADLINE)) == 4 for future in running)
    assert engine.alive()


def adapter(directory, base, seed, scale):
    """Writes an adapter of a model to a directory; returns the model with it."""
    torch.manual_seed(seed)
    config = PeftConfig(r=4, lora_alpha=16, target_modules=TARGETS, init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager"), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(scale)
    model.save_pretrained(directory)
    assert set(ADAPTER_FILES) <= {path.name for path in directory.iterdir()}
    assert json.loads((directory / "adapter_config.json").read_text())["r"] == 4
    return model


def test_adapters_arrive_one_after_the_other_also_under_the_same_number(own_process, untied_model, tmp_path):
    engine = start(untied_model, own_process, lora=LoraConfig(rank=4, targets=TARGETS))
    base = score(AutoModelForCausalLM.from_pretrained(untied_model))
    for number, seed in ((1, 1), (2, 2), (2, 3)):  # the last one replaces another of its number
        directory = tmp_path / str(seed)
        expected = score(adapter(directory, untied_model, seed, 4.0))
        assert abs(expected - base) > 1e-3
        update(engine, FromAdapter(str(directory), number), adapter=number)
        assert engine.score(PROMPT, RESPONSE).result(DEADLINE) == pytest.approx(expected, abs=1e-4)
    engine.sleep().result(DEADLINE)
    update(engine, FromAdapter(str(tmp_path / "1"), 3), adapter=3)
    assert engine.score(PROMPT, RESPONSE).result(DEADLINE) != pytest.approx(expected, abs=1e-4)
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("doing", ["sampling", "receiving weights", "nothing"])
def test_when_the_core_is_killed_nothing_waits(doing, untied_model):
    others = processes()
    engine = start(untied_model, True, receives_broadcasts=True)
    (core,) = [process for process in processes() if process not in others]
    waiting, sender = [], None
    if doing == "sampling":
        waiting = [engine.sample(Prompt(PROMPT, i), LONG) for i in range(40)]
    elif doing == "receiving weights":
        sender = GlooSender(60)
        layout = layout_of(changed(untied_model, 1.0), torch.float32, 1000)
        plan = FromBroadcast(BroadcastOffer("127.0.0.1", sender.port, layout), 1, 2)
        waiting = [engine.update_weights(plan.calls(60), lambda phase: None)]
    time.sleep(0.5)
    os.kill(core.pid, signal.SIGKILL)
    killed = time.monotonic()
    for future in waiting:
        try:
            future.result(NOTICE)  # a few samples may have been finished before
        except (EngineDead, WeightTransferFailed):
            continue
    while engine.alive() and time.monotonic() < killed + NOTICE:
        time.sleep(0.1)
    assert time.monotonic() - killed < NOTICE
    assert not engine.alive()
    with pytest.raises(EngineDead):
        engine.sample(Prompt(PROMPT, 1), FREE)
    engine.close()
    assert ended(len(others) + 1)
    if sender is not None:
        sender.destroy()
