"""A plan's memory of activations is that of the real training step, at the sizes of real models."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from architectures import hugging_face_config
from fake_step import activation_peak

from aft_ray.config.run import load_config
from aft_ray.planning.plan.architecture import architecture_of
from aft_ray.planning.plan.assumptions import PlanAssumptions
from aft_ray.planning.plan.training_memory import LOGITS, row_tokens, training_memory
from aft_ray.planning.plan.workload import workload
from aft_ray.training.forward import scoring

CONFIGS = Path(__file__).parents[3] / "jobs/configs"
RUNS = ["llama2_7b_gsm8k", "llama2_13b_gsm8k", "llama2_70b_gsm8k", "qwen2_5_72b_gsm8k"]
ASSUMED = PlanAssumptions()


@pytest.fixture(autouse=True)
def chunks_of_a_gpu(monkeypatch):
    """Chunks of logits as large as on a GPU: plans are for those."""
    monkeypatch.setitem(scoring._CHUNK_ELEMENTS, "cpu", scoring._CHUNK_ELEMENTS["cuda"])


def test_a_plan_knows_the_size_of_a_chunk():
    assert scoring._CHUNK_ELEMENTS["cuda"] == LOGITS
    assert scoring.chunk_tokens(1 << 30, "cuda") == 128


def measured_activations(config, model, prompt) -> float:
    """Bytes at the peak of the largest row: of one to three layers, from which the others follow."""
    tokens, _ = row_tokens(config, config.training.workers)
    one, two, three = (
        activation_peak(
            hugging_face_config(replace(model, layers=layers)),
            getattr(torch, config.model.dtype),
            tokens,
            round(prompt),
            config.sampling.max_tokens,
            config.sampling.k,
            config.training.activation_checkpointing,
        )
        for layers in (1, 2, 3)
    )
    assert three - two == two - one  # each layer adds the same
    return one + (model.layers - 1) * (two - one)


def arithmetic_of_zero3(model, workers) -> float:
    """Bytes of what DeepSpeed keeps at stage 3 in bfloat16, from its rules; without activations."""
    share = 2 + 4 + 4 + 8  # weights, gradients in float32, master weights, Adam's moments
    buckets = 2 * (2 * 50_000_000 + model.vocabulary * model.hidden)
    reduced = 4 * max(100_000_000, model.vocabulary * model.hidden)  # the float32 copy of what is being reduced
    gathered = 2 * min(model.parameters, 1_000_000_000)
    return share * model.parameters / workers + buckets + reduced + gathered


@pytest.mark.parametrize("name", RUNS)
def test_a_plan_has_the_memory_of_the_real_step(name):
    config = load_config(str(CONFIGS / f"{name}.yaml"))
    model, work = architecture_of(config), workload(config, ASSUMED)
    workers = config.training.workers
    planned = training_memory(config, model, work, ASSUMED, workers)
    reserve = ASSUMED.training_reserve * 1e9
    activations = measured_activations(config, model, work.prompt)
    # At stage 3 the optimizer's step may need more than the activations, when these are gone.
    step = 8 * min(1_000_000_000, model.parameters // workers)
    real = arithmetic_of_zero3(model, workers) + max(activations, step)
    assert planned.device - reserve == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("checkpointing", ["full", "none"])
@pytest.mark.parametrize("name", RUNS)
def test_planned_activations_are_those_of_the_real_step(name, checkpointing, dtype):
    overrides = [f"training.activation_checkpointing={checkpointing}", f"model.dtype={dtype}"]
    # With the optimizer in CPU memory, its step needs nothing on the GPU.
    config = load_config(str(CONFIGS / f"{name}.yaml"), [*overrides, "training.offload_optimizer=true"])
    model, work = architecture_of(config), workload(config, ASSUMED)
    lines = {
        line.label: line.value for line in training_memory(config, model, work, ASSUMED, config.training.workers).lines
    }
    planned = lines["saved activations"] + lines["largest passing need"]
    # On the CPU `selective` keeps the part of attention that is the prompts' as well, before the parts are joined.
    tolerance = 0.1 if checkpointing == "selective" or dtype == "float32" else 0.02
    assert planned == pytest.approx(measured_activations(config, model, work.prompt), rel=tolerance)
