"""The benchmark of the training step, small: both steps agree, and its parts give the numbers that it prints."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# A model and groups that take seconds; the numbers mean nothing.
PROGRAM = """
import json, sys
from pathlib import Path
sys.path.insert(0, {benchmarks!r})
import training
from training_data import gsm8k_groups, uniform_groups, write_model
from training_sides import Task, prepare_process
from training_memory import MemoryTask, measure
from aft_ray.objectives import build_objective

prepare_process()
scratch = Path(sys.argv[1])
model = write_model(scratch / "model", vocabulary=64, hidden=64, layers=2, longest=1024)
sides = training.build_sides(model)
groups = uniform_groups(5, 3, 64, 0, prompt=(3, 20), response=(2, 12))
vft, aft = build_objective("vft"), build_objective("aft_boundary", beta=0.15)
equal = {{
    name: training.check_equal(sides, Task(groups, objective, budget=budget)).loss
    for name, objective, budget in (("vft", vft, 16384), ("aft", aft, 16384), ("over budget", aft, 40))
}}
try:
    sides["before"].engine.module.model.norm.weight.data *= 1.01
    training.check_equal(sides, Task(groups, aft))
    refused = ""
except RuntimeError as error:
    refused = str(error)
sides = training.build_sides(model)
share = Task(gsm8k_groups(16, 2, 64, 0), aft, ranks=4)
regime = training.Regime("gsm8k", "small", (share,), Task(share.groups[:1], aft), 2)
whole = Task(groups, aft)
demo = {{name: training.Regime(name, name, (whole,), whole, 1) for name in ("demo_vft", "demo_aft")}}
results = {{
    "regimes": {{
        name: training.run_regime(one, sides, None, model) for name, one in {{"gsm8k": regime, **demo}}.items()
    }},
    "memory": {{}},
}}
task = MemoryTask(groups=2, k=3, vocabulary=64, prompt=(200, 200), response=(300, 300), budget=8192)
memory = {{side: measure(side, model, task) for side in ("padded", "packed")}}
print(json.dumps({{
    "equal": equal, "refused": refused, "regime": results["regimes"]["gsm8k"], "summary": training.summary(results),
    "memory": {{side: [one.at_rest, one.peak, one.step] for side, one in memory.items()}},
}}))
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    place = tmp_path_factory.mktemp("training")
    program = place / "small.py"
    program.write_text(PROGRAM.format(benchmarks=str(ROOT / "benchmarks")))
    done = subprocess.run([sys.executable, str(program), str(place)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_two_steps_agree_and_another_model_is_noticed(small):
    losses = small["equal"]
    assert all(math.isfinite(loss) and loss > 0 for loss in losses.values())
    assert losses["over budget"] == pytest.approx(losses["aft"], rel=1e-5)
    assert "differs" in small["refused"]


def test_a_regime_has_the_numbers_of_both_sides(small):
    regime = small["regime"]
    assert set(regime["sides"]) == {"before", "now"}
    for side in regime["sides"].values():
        assert len(side["cpu_s"]) == len(side["wall_s"]) == 2
        assert side["needed_tokens_per_cpu_s"] == pytest.approx(regime["needed_tokens"] / side["median_cpu_s"])
    pairs = [
        theirs / own
        for theirs, own in zip(*(regime["sides"][name]["cpu_s"] for name in ("before", "now")), strict=True)
    ]
    against = regime["ratios"]["before"]
    assert (against["low"], against["high"]) == (min(pairs), max(pairs))
    # The slowest rank pads before, and now computes about what is needed.
    assert regime["computed_tokens"]["before"] > 1.5 * regime["computed_tokens"]["now"]
    assert regime["computed_tokens"]["now"] < 1.3 * regime["needed_tokens"]


def test_the_last_line_has_a_ratio_of_each_regime(small):
    assert set(small["summary"]) == {"speedup_gsm8k", "speedup_demo_vft", "speedup_demo_aft", "speedup_demo"}


def test_memory_is_measured_in_processes_of_their_own(small):
    for at_rest, peak, step in small["memory"].values():
        assert peak > 0
        assert step == peak - at_rest > 0


def test_the_lengths_of_gsm8k_are_those_of_its_quantiles():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from training_data import gsm8k_groups, needed_tokens

    groups = gsm8k_groups(1000, 2, 64, 0)
    assert groups == gsm8k_groups(1000, 2, 64, 0)
    prompts = [len(group.prompt_token_ids) for group in groups]
    references = [len(group.reference_token_ids) for group in groups]
    assert 68 < sum(prompts) / 1000 < 75  # 65 of the question, 6 of the template
    assert 88 < sum(references) / 1000 < 98
    assert 16 <= min(references) <= max(references) <= 431
    assert needed_tokens(groups[:1]) == prompts[0] + references[0] + sum(
        len(one.token_ids) for one in groups[0].candidates
    )
