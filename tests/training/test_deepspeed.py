"""Two ranks of DeepSpeed over gloo against one process of plain torch that runs every step as one padded batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from padded_reference import step_loss
from peft import PeftModel
from rank_main import BUDGET, GROUPS, LORA, OBJECTIVE, PER_STEP, RATE, WEIGHT
from tiny import tiny_config
from training_helpers import PAD, plan, random_groups, write_tiny_llama
from transformers import AutoModelForCausalLM

from aft_ray.config.run import TrainingConfig
from aft_ray.training.model.loading import load_model
from aft_ray.training.model.lora import add_adapters, load_adapter
from aft_ray.training.state.scratch import state_bytes, trained_parameters
from aft_ray.weights.export import write_adapter

pytestmark = pytest.mark.timeout(2400)

SUPPORT = Path(__file__).parents[1] / "support"
STAGES = range(4)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ranks")
    write_tiny_llama(directory / "model")
    write_tiny_llama(directory / "poisoned", poisoned=True)
    write_adapter(with_adapters(directory), directory / "adapter", 0)
    return directory


def with_adapters(work, adapter=None):
    """The model with adapters: those of a directory, or random ones that change the outputs, unlike new ones."""
    torch.manual_seed(5)
    model = load_model(work / "model", "float32")
    add_adapters(model, LORA, str(work / "model"))
    if adapter is not None:
        load_adapter(model, adapter)
        return model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def run_ranks(work, count):
    """Runs `rank_main.py` on so many ranks and returns what rank 0 wrote."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SUPPORT.parents[1]), str(SUPPORT)])}
    command = [sys.executable, str(SUPPORT / "rank_main.py")]
    outputs = [work / f"{rank}.{kind}" for rank in range(count) for kind in ("out", "err")]
    ranks = []
    for rank in range(count):
        with open(work / f"{rank}.out", "w") as out, open(work / f"{rank}.err", "w") as err:
            arguments = [*command, str(rank), str(count), port, str(work)]
            ranks.append(subprocess.Popen(arguments, env=environment, stdout=out, stderr=err))
    try:
        for process in ranks:  # the first run on a machine compiles two operations, some minutes
            assert process.wait(timeout=1500) == 0, "\n".join(path.read_text()[-3000:] for path in outputs)
    finally:
        for process in ranks:
            process.kill()
    assert [(work / f"{rank}.out").read_text() for rank in range(count)] == [""] * count
    return torch.load(work / f"results-{count}.pt", weights_only=False)


@pytest.fixture(scope="module")
def results(work):
    return run_ranks(work, 2)


@pytest.fixture(scope="module")
def resized(work, results):
    """The results of one rank and of three that continue from the checkpoints of two."""
    return {count: run_ranks(work, count) for count in (1, 3)}


@pytest.fixture(scope="module")
def plain(work):
    return train_plainly(load_model(work / "model", "float32"))


@pytest.fixture(scope="module")
def plain_adapters(work):
    return train_plainly(with_adapters(work, work / "adapter"))


def train_plainly(model):
    """Trains with plain torch and one batch per step. Returns losses, gradient norms and the trained weights.

    A weight is NaN where a clipped gradient was below Adam's epsilon of 1e-8, but not zero. There Adam divides a
    rounding error by its own size, so that the step differs from one processor to another.
    """
    groups = random_groups(GROUPS)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), weight_decay=0.01)
    losses, norms = [], []
    rounded = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in trained.items()}
    steps = plan(groups, OBJECTIVE, ranks=1, groups_per_step=PER_STEP, epochs=2)
    for number, (chosen, _) in enumerate(steps):
        loss = step_loss(model, [groups[index] for index in chosen], OBJECTIVE, WEIGHT, PAD)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trained.values(), 0.5).item())
        for name, parameter in trained.items():
            rounded[name] |= (parameter.grad != 0) & (parameter.grad.abs() < 1e-8)
        losses.append(loss.item())
        optimizer.param_groups[0]["lr"] = RATE / (number + 1)
        optimizer.step()
        optimizer.zero_grad()
    assert sum(mask.sum() for mask in rounded.values()) < 1e-3 * sum(p.numel() for p in trained.values())
    return losses, norms, {name: p.detach().masked_fill(rounded[name], torch.nan) for name, p in trained.items()}


def assert_equal_weights(left, right, tolerance):
    """The weights are equal wherever `right` is not NaN."""
    assert left.keys() == right.keys()
    for name, weight in left.items():
        known = ~right[name].isnan()
        assert torch.allclose(weight[known], right[name][known], atol=tolerance), name


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_what_is_compared_has_split_groups_and_ranks_without_any(ranks):
    steps = plan(random_groups(GROUPS), OBJECTIVE, ranks=ranks, groups_per_step=PER_STEP, budget=BUDGET, epochs=2)
    pieces = [[sum(batch.piece is not None for batch in share) for share in one.shares] for _, one in steps]
    assert any(map(any, pieces))
    assert ranks < 3 or any(0 < min(one) < max(one) for one in pieces)
    assert ranks == 1 or any(not share for _, one in steps for share in one.shares)


@pytest.mark.parametrize("stage", STAGES)
def test_dropout_is_the_same_in_both_passes_over_a_split_group(results, stage):
    outputs = results[f"dropout{stage}"]
    assert len(outputs) > 1
    assert all(torch.equal(scored, trained) for scored, trained in outputs)


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


@pytest.mark.parametrize("stage", [2, 3])
def test_offloaded_states_change_no_step(results, plain, stage):
    losses, norms, weights = plain
    stats = results[f"offloaded{stage}"]["stats"]
    assert [s.loss for s in stats] == pytest.approx(losses, abs=1e-5)
    assert [s.grad_norm for s in stats] == pytest.approx(norms, rel=1e-4)
    assert_equal_weights(results[f"offloaded{stage}"]["weights"], weights, 1e-5)
    assert [s.loss for s in results[f"moved{stage}"]["stats"]] == pytest.approx(losses[3:], abs=1e-5)
    assert_equal_weights(results[f"moved{stage}"]["weights"], weights, 1e-5)


@pytest.mark.parametrize("stage", [2, 3])
def test_bfloat16_with_offloading_and_activation_checkpointing_stays_near(results, plain, stage):
    losses, _, weights = plain
    assert [s.loss for s in results[f"bfloat16_offloaded{stage}"]["stats"]] == pytest.approx(losses, rel=0.02)
    assert_equal_weights(results[f"bfloat16_offloaded{stage}"]["weights"], weights, 0.02)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_ranks_continues_with_the_same_steps(resized, plain, count, stage):
    losses, _, weights = plain
    continued = resized[count][f"checkpoint{stage}"]
    assert continued["state"]["round"] == 7
    assert [s.loss for s in continued["stats"]] == pytest.approx(losses[3:], abs=1e-5)
    assert_equal_weights(continued["weights"], weights, 1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_adapters_train_as_in_plain_torch_and_nothing_else_changes(results, plain_adapters, stage):
    losses, norms, weights = plain_adapters
    trained = results[f"adapters{stage}"]
    assert [s.loss for s in trained["stats"]] == pytest.approx(losses, abs=1e-5)
    assert [s.grad_norm for s in trained["stats"]] == pytest.approx(norms, rel=1e-4)
    assert_equal_weights(trained["weights"], weights, 1e-5)
    assert trained["kept"]


@pytest.mark.parametrize("stage", STAGES)
def test_adapters_resume_from_a_checkpoint_without_the_frozen_weights(results, stage):
    trained = results[f"adapters{stage}"]
    assert [s.loss for s in trained["again"]] == [s.loss for s in trained["stats"][3:]]
    assert sum(trained["written"]) < sum(results[f"stage{stage}"]["written"]) / 3


@pytest.mark.parametrize("count", [1, 3])
def test_adapters_continue_on_another_number_of_ranks(resized, plain_adapters, count):
    losses, _, weights = plain_adapters
    continued = resized[count]["adapters3"]
    assert [s.loss for s in continued["stats"]] == pytest.approx(losses[3:], abs=1e-5)
    assert_equal_weights({name: continued["weights"][name] for name in weights}, weights, 1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_a_merged_model_is_the_base_with_its_adapter(results, work, stage):
    exported = work / f"exported{stage}"
    merged = AutoModelForCausalLM.from_pretrained(exported / "model", use_safetensors=True)
    base = AutoModelForCausalLM.from_pretrained(work / "model")
    assert merged.state_dict().keys() == base.state_dict().keys()
    tokens = torch.arange(1, 40).reshape(3, 13)
    with torch.no_grad():
        plain_logits = base(tokens).logits
        logits = PeftModel.from_pretrained(base, exported / "adapter").eval()(tokens).logits
        assert torch.allclose(merged(tokens).logits, logits, atol=1e-4)
        assert (logits - plain_logits).abs().max() > 0.1


def test_statistics_are_the_same_on_every_rank(results):
    first, second = (
        {n: [vars(s) | {"seconds": 0} for s in stats] for n, stats in r.items()} for r in results["all_ranks"]
    )
    assert first == second
    stats = results["stage0"]["stats"][0]
    assert stats.tokens > 0
    assert stats.right_score < 0
    assert stats.wrong_score < 0


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_of_bfloat16_training_are_reduced_in_float32(results, stage):
    # Equal to the last bit, so every rank's own gradients are also those of the model without ZeRO.
    assert results[f"reduced{stage}"] == {"float32": True, "bfloat16": False}


def test_no_process_group_has_less_than_the_timeout_of_the_run(results):
    # torch's own default is 1,800 s over gloo. The world group, DeepSpeed's clone of it, and that of checkpoints.
    assert len(results["timeouts"]) >= 3
    assert min(results["timeouts"]) >= TrainingConfig().timeout_s == 3600


def test_a_second_copy_of_the_weights_inside_a_node_changes_no_step(results, plain, work):
    losses, _, weights = plain
    assert [s.loss for s in results["hpz"]["stats"]] == pytest.approx(losses, abs=1e-5)
    assert_equal_weights(results["hpz"]["weights"], weights, 1e-5)
    exported = AutoModelForCausalLM.from_pretrained(work / "exported_hpz" / "model").state_dict()
    assert_equal_weights({name: exported[name] for name in weights}, results["hpz"]["weights"], 0)


@pytest.mark.parametrize("stage", STAGES)
def test_a_node_fetches_the_files_of_its_own_ranks_alone(results, stage):
    kinds = ["model", "optim"] if stage == 3 else ["optim"] if stage else []
    own = [f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt" for kind in kinds for rank in range(2)]
    assert results[f"resumed{stage}"]["fetched"] == sorted(own + ([] if stage == 3 else ["mp_rank_00_model_states.pt"]))


@pytest.mark.parametrize("stage", STAGES)
def test_the_room_that_a_run_asks_for_is_that_of_its_files(results, work, stage):
    config = tiny_config(work, work / "model", training={"zero_stage": stage}, model={"dtype": "float32"})
    parameters = trained_parameters(config)
    asked_for = [state_bytes(config, parameters, rank, 2) for rank in range(2)]
    # A file has about 1 KiB beside the tensors of each parameter, which is much only in such a small model.
    assert results[f"stage{stage}"]["written"] == pytest.approx(asked_for, rel=0.02, abs=20_000)
