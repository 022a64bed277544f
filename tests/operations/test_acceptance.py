"""The acceptance suite in its small form on a CPU: what passes, what is caught, and what a check says that cannot run.

No GPU has run the suite. What a GPU alone can show is in test_acceptance_gpu.py.
"""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from local_cluster import local_cluster
from torch.utils.flop_counter import FlopCounterMode

from aft_ray.operations.acceptance import machine, reference, speed, suite
from aft_ray.operations.acceptance.models import (
    GroupShape,
    random_groups,
    transformers_config,
    write_character_tokenizer,
)
from aft_ray.operations.acceptance.outcome import Figure, Outcome, from_json, judge
from aft_ray.operations.acceptance.process import run_to_end
from aft_ray.operations.acceptance.reference import Steps, compare
from aft_ray.operations.acceptance.suite import CHECKS, Check, Setting, chosen, run_checks, run_here
from aft_ray.operations.acceptance.training import SMALL_MODEL
from aft_ray.planning.plan.architecture import PRESETS
from aft_ray.planning.plan.hardware import NODES
from aft_ray.planning.plan.quantities import GB
from aft_ray.planning.plan.training_memory import row_tokens, training_memory
from aft_ray.planning.plan.workload import workload

SMALL = Setting(small=True)


def run_without(modules, names) -> list[Outcome]:
    """The outcomes of checks in one process in which some modules cannot be imported."""
    code = f"""
import sys
import time
for name in {modules!r}:
    sys.modules[name] = None
from aft_ray.operations.acceptance.suite import Setting, chosen, run_here
from aft_ray.operations.acceptance.training import process_group
with process_group():
    for check in chosen({names!r}):
        print("outcome " + run_here(check, Setting(small=True)).as_json())
assert not [name for name in sys.modules if name.partition(".")[0] in ("ray", "vllm") and sys.modules[name]]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return [from_json(line.removeprefix("outcome ")) for line in done.stdout.splitlines() if line.startswith("outcome")]


def test_the_part_of_training_passes_where_neither_ray_nor_vllm_is_installed():
    names = ["step", "step-zero-0", "step-zero-3", "step-offload", "step-lora", "train-1b"]
    outcomes = run_without(["ray", "vllm"], names)
    assert [(one.name, one.result, one.reason) for one in outcomes] == [(name, "passed", "") for name in names]
    assert all(len(one.figures) >= 4 for one in outcomes)


def test_without_deepspeed_plain_torch_runs_and_the_rest_says_what_is_missing():
    outcomes = run_without(["ray", "vllm", "deepspeed"], ["training"])
    assert {one.name: one.result for one in outcomes if one.result != "skipped"} == {"step": "passed"}
    assert {one.reason for one in outcomes if one.result == "skipped"} == {
        "needs deepspeed, which this machine does not have"
    }


@pytest.fixture(scope="module")
def steps() -> Steps:
    torch.manual_seed(0)
    gradients = {name: torch.randn(40, 30) * size for name, size in (("large", 1), ("small", 0.05), ("tiny", 1e-4))}
    return Steps((6.0, 5.5), 2.0, gradients)


def refused(seen, expected) -> list[str]:
    return [figure.name for figure in compare(seen, expected) if not figure.accepted]


def test_steps_within_bfloat16_rounding_are_accepted(steps):
    rounded = {name: gradient.to(torch.bfloat16).float() for name, gradient in steps.gradients.items()}
    assert refused(replace(steps, gradients=rounded, losses=(6.01, 5.49)), steps) == []


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"losses": (6.2, 5.5)}, "off by"),
        ({"losses": (6.0, 6.0)}, "after a step off by"),
        ({"losses": (float("nan"), 5.5)}, "off by"),
        ({"grad_norm": 4.0}, "gradient norm off by"),
        ({"grad_norm": 2.06}, "gradient norm off by"),
    ],
)
def test_a_wrong_loss_or_norm_is_refused(steps, change, what):
    assert refused(replace(steps, **change), steps) == [what]


@pytest.mark.parametrize("wrong", ["missing", "negative", "mixed", "nan"])
def test_one_wrong_tensor_is_named_though_the_whole_gradient_hardly_changes(steps, wrong):
    gradients = dict(steps.gradients)
    small = gradients.pop("small")
    other = {"negative": -small, "mixed": small.flip(0), "nan": small * float("nan")}
    if wrong != "missing":
        gradients["small"] = other[wrong]
    assert "worst tensor (small) off by" in refused(replace(steps, gradients=gradients), steps)


def test_a_step_is_held_against_the_formula_of_adamw():
    torch.manual_seed(1)
    weight = torch.nn.Parameter(torch.randn(50))
    before, gradient = weight.detach().clone(), torch.randn(50)
    config = run_config(weight_decay=0.1, learning_rate=1e-3)
    optimizer = torch.optim.AdamW([weight], lr=1e-3, weight_decay=0.1, eps=reference.EPSILON)
    weight.grad = gradient.clone()
    optimizer.step()
    torch.testing.assert_close(weight.detach(), reference.adamw_step(before, gradient, config), rtol=0, atol=1e-7)


def run_config(**training):
    from aft_ray.config.run import parse_config

    return parse_config({"run_dir": "/x", "model": {"name": "/x"}, "training": training}).training


# ── the suite ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_check_that_cannot_run_says_why(monkeypatch):
    (two,) = chosen(["run-nccl"])
    have = machine.gpu_count()
    if have < 2:
        assert run_here(two, Setting()).reason.startswith(f"needs 2 GPUs, this machine has {have}")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    nodes = run_here(chosen(["run-two-nodes"])[0], Setting())
    assert (nodes.result, nodes.reason.partition(":")[0]) == ("skipped", "needs 2 nodes")
    missing = run_here(replace(two, packages=("no_such_package",)), SMALL)
    assert missing.reason == "needs no_such_package, which this machine does not have"


def test_a_check_that_hangs_or_dies_has_failed_and_the_next_one_runs():
    hangs = Check("step", "training", lambda setting: [], timeout_s=0.5)
    dies = Check("no-such-check", "training", lambda setting: [])
    found = list(run_checks([hangs, dies], SMALL))
    assert [(one.name, one.result) for one in found] == [("step", "failed"), ("no-such-check", "failed")]
    assert found[0].reason == "it did not end within 0 s"
    assert found[1].reason.startswith("its process ended with status 1 and said: ValueError")


def test_an_error_inside_a_check_is_a_failure_in_one_line():
    def measure(setting):
        raise RuntimeError("CUDA out of memory\nand a long explanation")

    outcome = run_here(Check("broken", "training", measure, gpus=0), SMALL)
    assert (outcome.result, outcome.reason) == ("failed", "RuntimeError: CUDA out of memory")


def test_the_line_of_an_outcome_has_all_that_a_ticket_needs():
    figures = [Figure("peak", 12.5, "GB"), Figure("off by", -0.2, limit=0.1), Figure("way", "LoRA")]
    outcome = judge("train-7b", figures, 61.0)
    assert from_json(outcome.as_json()) == outcome
    line = outcome.line({"card": "1 x NVIDIA H100 80GB HBM3", "torch": "2.14.0", "driver": "580.65.06"})
    assert line == (
        "failed: train-7b | peak 12.5 GB; off by -0.2 (at most 0.1) NOT ACCEPTED; way LoRA | 61 s | "
        "1 x NVIDIA H100 80GB HBM3 | torch 2.14.0, driver 580.65.06"
    )
    assert judge("x", [Figure("off by", float("nan"), limit=1)], 0).result == "failed"


def test_the_command_ends_with_a_status_that_tells_a_failure(monkeypatch, capsys):
    from aft_ray import cli

    def ended(result):
        monkeypatch.setattr(
            "aft_ray.operations.acceptance.command.run_checks", lambda checks, setting: [Outcome("step", result)]
        )
        try:
            cli.main(["doctor", "--accept", "--only", "step"])
        except SystemExit as exit:
            return exit.code
        return 0

    assert [ended(result) for result in ("passed", "skipped", "failed")] == [0, 0, 1]
    assert "failed: step" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", "--accept", "--only", "stepp"])
    assert stopped.value.code == 2
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", "--small"])
    assert stopped.value.code == 2
    assert "stepp is no acceptance check" in capsys.readouterr().err


def test_names_are_unique_and_every_check_can_be_chosen():
    assert len({check.name for check in CHECKS} | set(suite.PARTS)) == len(CHECKS) + len(suite.PARTS)
    assert {check.name for part in suite.PARTS for check in chosen([part])} == {check.name for check in CHECKS}


# ── what is computed ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_model_flops_are_those_that_torch_counts():
    from transformers import AutoModelForCausalLM

    sizes = replace(SMALL_MODEL, hidden=128, intermediate=256, heads=2, kv_heads=1, vocabulary=512)
    model = AutoModelForCausalLM.from_config(transformers_config(sizes), attn_implementation="eager")
    row, rows = 48, 3
    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids=torch.zeros(rows, row, dtype=torch.long), use_cache=False).logits.sum()
        loss.backward()
    # The first layer's inputs have gradients too: they are the embeddings.
    assert counter.get_total_flops() == pytest.approx(speed.model_flops(sizes, row, row, True) * row * rows, rel=0.01)
    assert speed.model_flops(sizes, row, row, False) == pytest.approx(speed.model_flops(sizes, row, row, True) * 2 / 3)


def test_mfu_is_flops_over_the_peak_of_the_card_and_an_unknown_card_has_none():
    assert speed.mfu(6e9, 50_000, 1e15) == pytest.approx(0.3)
    assert machine.node_of_card("NVIDIA H100 80GB HBM3") is NODES["h100-80gb"]
    assert machine.node_of_card("NVIDIA H100 PCIe") is None  # its clocks are lower
    assert machine.host_memory() > 1 * GB


@pytest.mark.parametrize("sections", speed._WAYS.values(), ids=list(speed._WAYS))
def test_the_groups_fill_the_planned_row_exactly(sections, tmp_path):
    from aft_ray.objectives import build_objective
    from aft_ray.training.balance import load_of
    from aft_ray.training.batching import group_size

    config = speed._config(tmp_path / "model", sections, gpu=False, small=False)
    response = config.sampling.max_tokens
    lengths = (config.model.max_length - response,) * 2, (response,) * 2
    groups = random_groups(GroupShape(config.training.groups_per_step, config.sampling.k, *lengths), 1000)
    sizes = [group_size(group, build_objective("aft_boundary")) for group in groups]
    assert sum(load_of(size.prompt, size.responses).tokens for size in sizes) == row_tokens(config, 1)[0]


def test_the_reserve_of_a_plan_is_not_expected_of_the_allocator(tmp_path):
    model = PRESETS["meta-llama/llama-3.2-1b"]
    config = speed._config(tmp_path / "model", {"training": {"zero_stage": 3}}, gpu=True, small=False)
    assumptions = speed._assumptions(config)
    planned = training_memory(config, model, workload(config, assumptions), assumptions, 1)
    assert planned.device - speed.allocated_bytes(planned) == assumptions.training_reserve * GB > 0


def test_the_tokenizer_of_the_runs_gives_every_text_back(tmp_path):
    from transformers import AutoTokenizer

    write_character_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "Tom has 12 apples.\nHow many?  #### 7"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 99


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["engine-scores", "engine-sleep", "run-lora", "run-nccl"])
def test_engines_and_runs_pass_in_small_form(name):
    (outcome,) = run_checks(chosen([name]), SMALL)
    assert outcome.result == "passed", json.loads(outcome.as_json())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_over_two_nodes_passes_in_small_form(tmp_path, monkeypatch):
    with local_cluster(4) as cluster:
        cluster.add_node()
        for name, value in (cluster.environment | {"RAY_ADDRESS": cluster.gcs}).items():
            monkeypatch.setenv(name, value)
        (outcome,) = run_checks(chosen(["run-two-nodes"]), Setting(True, str(tmp_path)))
    assert outcome.result == "passed", json.loads(outcome.as_json())
    assert outcome.figures[0] == Figure("nodes", 2)


def test_a_command_that_ends_leaves_no_process_that_it_started():
    started = (
        "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)"
    )
    before = time.monotonic()
    done = run_to_end([sys.executable, "-c", started], 30)
    assert time.monotonic() - before < 20
    deadline = time.monotonic() + 10
    while running(int(done.stdout)):
        assert time.monotonic() < deadline, f"process {done.stdout} still runs"
        time.sleep(0.05)


def running(pid) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
