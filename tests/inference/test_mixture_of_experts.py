"""A mixture of experts: a fresh engine, an updated engine and transformers give the same scores."""

import threading

import pytest
import torch
from tiny_families import CONTEXT, build, score, write

from aft_ray.coordination.broadcast_group import BroadcastGroup, Receiver
from aft_ray.inference.engine import Engine
from aft_ray.inference.engine_spec import EngineSpec
from aft_ray.run.preflight import EXPERT_TYPES
from aft_ray.weights.broadcast.sender import GlooSender, stream
from aft_ray.weights.export import layout_of, live_parameters
from aft_ray.weights.receive_plan import BroadcastOffer, FromBroadcast, FromDirectory

PROMPT, RESPONSE = [7, 8, 9, 10, 11, 12], [9, 10, 14, 30, 31, 1]
DEADLINE = 60


# The first runs in every CI; all of them give what `run/preflight.py` admits.
TYPES = ["qwen3_moe", *(pytest.param(name, marks=pytest.mark.slow) for name in EXPERT_TYPES if name != "qwen3_moe")]


@pytest.fixture(scope="module", params=TYPES)
def lab(request, tmp_path_factory):
    """An engine, and two models of which it was started with the first."""
    scratch = tmp_path_factory.mktemp(request.param)
    models = [build(request.param, seed) for seed in (1, 2)]
    directories = [write(scratch / str(number), model) for number, model in enumerate(models)]
    spec = EngineSpec(
        str(directories[0]), (1,), "float32", CONTEXT, 32, gpu=False, kv_cache_gib=0.25, receives_broadcasts=True
    )
    engine = Engine(spec)
    engine.fresh = engine._exclusive(lambda llm: llm.collective_rpc("held_digests")).result(DEADLINE)
    yield engine, models, directories
    engine.close()


def expected(model):
    return pytest.approx(score(model, PROMPT, RESPONSE), abs=2e-6)


def scored(engine) -> float:
    return engine.score(PROMPT, RESPONSE).result(DEADLINE)


def test_an_engine_updated_from_files_scores_as_a_fresh_one_and_as_transformers(lab):
    engine, models, directories = lab
    assert scored(engine) == expected(models[0])
    for number in (0, 1, 0, 1):
        plan = FromDirectory(str(directories[number]), ("model.safetensors",))
        engine.update_weights(plan.calls(DEADLINE), lambda phase: None).result(DEADLINE)
        assert scored(engine) == expected(models[number])
    assert abs(score(models[0], PROMPT, RESPONSE) - score(models[1], PROMPT, RESPONSE)) > 0.01


def test_an_updated_engine_holds_bit_for_bit_what_a_fresh_one_holds(lab):
    engine, _, directories = lab
    held = []
    for number in (0, 1, 0):
        plan = FromDirectory(str(directories[number]), ("model.safetensors",))
        engine.update_weights(plan.calls(DEADLINE), lambda phase: None).result(DEADLINE)
        held.append(engine._exclusive(lambda llm: llm.collective_rpc("held_digests")).result(DEADLINE))
    assert held[2] == held[0]
    different = {name for name, digest in held[0][0].items() if held[1][0][name] != digest}
    assert any("experts" in name for name in different)
    assert held[0] == engine.fresh


def test_an_engine_updated_by_a_broadcast_scores_as_transformers(lab):
    engine, models, _ = lab
    for model in models:
        layout, sender = layout_of(model, torch.float32, 30_000), GlooSender(DEADLINE)
        group = BroadcastGroup(1, (Receiver("sampler 0", 1),))
        sending = threading.Thread(target=stream, args=(live_parameters(model), layout, sender, group, float(DEADLINE)))
        sending.start()
        plan = FromBroadcast(BroadcastOffer("127.0.0.1", sender.port, layout), 1, 2)
        engine.update_weights(plan.calls(DEADLINE), lambda phase: None).result(DEADLINE)
        sending.join(DEADLINE)
        sender.destroy()
        assert scored(engine) == expected(model)
