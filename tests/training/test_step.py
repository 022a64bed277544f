"""One optimiser step without DeepSpeed: packing, splitting and the order of passes must change nothing."""

import torch
import torch.distributed as dist
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from padded_reference import step_loss
from training_helpers import PAD, POISON, PlainEngine, batches_of, make_group, plan, poisoned_group, random_groups
from training_helpers import write_tiny_llama
from transformers import AutoModelForCausalLM

from aft_ray.config.objectives import OBJECTIVES
from aft_ray.objectives import build_objective
from aft_ray.storage.records import Verdict
from aft_ray.training.loading import load_model
from aft_ray.training.scoring import install_scoring
from aft_ray.training.step import NonFiniteLoss, train_step

WEIGHT = 0.7


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", autouse=True)
def world():
    """A process group of one."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def padded(directory):
    """The model as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="sdpa").train()


@pytest.fixture(scope="module")
def engine(directory):
    model = load_model(directory, "float32")
    install_scoring(model)
    return PlainEngine(model)


def gradient_of(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def reference_step(padded, groups, objective):
    """Loss and gradient of the step as one padded batch."""
    padded.zero_grad()
    loss = step_loss(padded, groups, objective, WEIGHT, PAD)
    loss.backward()
    return loss.item(), gradient_of(padded)


def packed_step(engine, groups, objective, budget):
    """The statistics and the gradient of the step in passes of at most `budget` tokens."""
    ((chosen, planned),) = plan(groups, objective, ranks=1, groups_per_step=len(groups), budget=budget)
    engine.module.zero_grad()
    batches = batches_of(groups, chosen, planned, 0, objective)
    stats = train_step(engine, batches, planned, objective, WEIGHT, 0.0)
    return stats, gradient_of(engine.module)


def assert_same_gradient(one, other):
    """No number differs by more than a millionth of the gradient's norm."""
    assert (one - other).abs().max() <= 1e-6 * other.norm()


@pytest.mark.parametrize("budget", [10_000, 60, 21])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_step_is_that_of_padded_rows(padded, engine, name, budget):
    groups, objective = random_groups(10, k=6), build_objective(name)
    loss, gradient = reference_step(padded, groups, objective)
    stats, packed = packed_step(engine, groups, objective, budget)
    assert stats.loss == pytest.approx(loss, abs=1e-6)
    assert_same_gradient(packed, gradient)
    if budget == 21 and objective.uses_candidates:
        assert 0 < stats.score_passes <= stats.passes
    if budget == 10_000:
        assert (stats.passes, stats.score_passes) == (1, 0)
