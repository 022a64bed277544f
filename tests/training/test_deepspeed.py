"""Two ranks of DeepSpeed over gloo against one process of plain torch that runs every step as a single batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rank_main import GROUPS, OBJECTIVE, PER_STEP, RATE, WEIGHT
from training_helpers import PAD, plan, random_groups, write_tiny_llama

from aft_ray.config import TrainingConfig
from aft_ray.training.collate import collate
from aft_ray.training.deepspeed import ds_config, load_model
from aft_ray.training.step import micro_loss

HERE = Path(__file__).parent
STAGES = range(4)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ranks")
    write_tiny_llama(directory / "model")
    write_tiny_llama(directory / "poisoned", poisoned=True)
    return directory


@pytest.fixture(scope="module")
def results(work):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)])}
    command = [sys.executable, str(HERE / "rank_main.py")]
    outputs = [work / f"{rank}.{kind}" for rank in range(2) for kind in ("out", "err")]
    ranks = []
    for rank in range(2):
        with open(work / f"{rank}.out", "w") as out, open(work / f"{rank}.err", "w") as err:
            arguments = [*command, str(rank), "2", port, str(work)]
            ranks.append(subprocess.Popen(arguments, env=environment, stdout=out, stderr=err))
    try:
        for process in ranks:  # the first run on a machine compiles a communication op, about a minute
            assert process.wait(timeout=500) == 0, "\n".join(path.read_text()[-3000:] for path in outputs)
    finally:
        for process in ranks:
            process.kill()
    assert [(work / f"{rank}.out").read_text() for rank in range(2)] == ["", ""]
    return torch.load(work / "results.pt", weights_only=False)


@pytest.fixture(scope="module")
def plain(work):
    """Losses, gradient norms and final weights of plain torch, one batch a step."""
    model, groups = load_model(work / "model", "float32"), random_groups(GROUPS)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    losses, norms = [], []
    planned = [s for epoch in plan(groups, OBJECTIVE, ranks=1, groups_per_step=PER_STEP, epochs=2) for s in epoch]
    for number, step in enumerate(planned):
        indexes = [index for batch in step.shares[0] for index in batch]
        batch = collate([groups[index] for index in indexes], OBJECTIVE, PAD)
        loss, _ = micro_loss(model, batch, OBJECTIVE, WEIGHT, step.totals)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        losses.append(loss.item())
        optimizer.param_groups[0]["lr"] = RATE / (number + 1)
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, {name: p.detach() for name, p in model.named_parameters()}


def assert_equal_weights(left, right, tolerance):
    assert left.keys() == right.keys()
    for name, weight in left.items():
        assert torch.allclose(weight, right[name], atol=tolerance), name


@pytest.mark.parametrize("stage", STAGES)
def test_two_sharded_ranks_equal_plain_torch(results, plain, stage):
    losses, norms, weights = plain
    stats = results[f"stage{stage}"]["stats"]
    assert len(losses) == 6
    assert [s.loss for s in stats] == pytest.approx(losses, abs=1e-5)
    assert [s.grad_norm for s in stats] == pytest.approx(norms, rel=1e-4)
    assert [s.loss for s in stats] == pytest.approx([s.vft_loss + WEIGHT * s.alignment_loss for s in stats], abs=1e-5)
    assert min(norms) > 0.5  # so that clipping is part of what is compared
    assert_equal_weights(results[f"stage{stage}"]["weights"], weights, 1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_engine_takes_the_same_steps(results, stage):
    whole, resumed = results[f"stage{stage}"], results[f"resumed{stage}"]
    assert [s.loss for s in resumed["stats"]] == [s.loss for s in whole["stats"][3:]]
    assert_equal_weights(resumed["weights"], whole["weights"], 0)
    assert resumed["state"]["round"] == 7


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_with_activation_checkpointing_stays_near(results, plain, stage):
    losses, _, weights = plain
    assert [s.loss for s in results[f"bfloat16_{stage}"]["stats"]] == pytest.approx(losses, rel=0.02)
    assert_equal_weights(results[f"bfloat16_{stage}"]["weights"], weights, 0.02)


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_not_finite_stops_every_rank_before_the_weights_change(results, stage):
    faults = results[f"fault{stage}"]
    assert [fault["ids"] for fault in faults] == [["poisoned"], ["poisoned"]]
    assert all(fault["unchanged"] for fault in faults)
    assert "the loss is not finite on the questions poisoned" in faults[0]["message"]


def test_statistics_are_the_same_on_every_rank(results):
    first, second = (
        {n: [vars(s) | {"seconds": 0} for s in stats] for n, stats in r.items()} for r in results["all_ranks"]
    )
    assert first == second
    stats = results["stage0"]["stats"][0]
    assert stats.tokens > 0
    assert stats.right_score < 0
    assert stats.wrong_score < 0


def test_bfloat16_without_zero_accumulates_in_float32():
    assert ds_config(TrainingConfig(zero_stage=0), "bfloat16")["zero_optimization"]["stage"] == 1
    assert ds_config(TrainingConfig(zero_stage=0), "float32")["zero_optimization"]["stage"] == 0
