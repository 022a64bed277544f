"""A run whose driver is killed repeatedly has the groups, losses and model of a run without interruption."""

import random
import time
from pathlib import Path

import pytest
import torch
import yaml
from drivers import assert_nothing_is_left, begin, finish, kill, reach
from safetensors.torch import load_file
from tiny import tiny_tree

from aft_ray.observe.summary import read_events
from aft_ray.storage.ledger import Ledger
from aft_ray.storage.run_dir import RunDir

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

# The driver is killed in these phases, a moment after the run directory shows that one has begun.
PHASES = ("sampling of round 1", "training of round 1")
SUMS = {"min_steps": 1, "max_steps": 1, "operations": "+", "max_operand": 5, "distractors": 0}


def in_phase(run_dir: Path, phase: str) -> bool:
    if phase == "sampling of round 1":
        return any(run_dir.glob("rounds/0001/groups/*.parquet"))
    number = int(phase[-1])
    events = read_events(RunDir(run_dir)) if run_dir.exists() else []
    return any(event["event"] == "step" and event["round"] == number for event in events)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model) -> tuple[RunDir, RunDir]:
    """The same config run without a pause, and killed in every phase."""
    place = tmp_path_factory.mktemp("resume")
    tree = tiny_tree(
        place / "whole",
        tiny_model,
        # The sums are so small that some candidates are right, and a round has so many steps that a kill falls in it.
        data={"train_limit": 48, "arithmetic": {**SUMS, "train_size": 200}},
        vft={"questions_per_step": 1, "epochs": 6},
        training={"groups_per_step": 1, "epochs": 4, "checkpoint_every_s": 0.5},
        sampling={"groups_per_file": 8},
    )
    file = place / "run.yaml"
    file.write_text(yaml.safe_dump(tree))
    started = [begin(file, place / "whole")]
    try:
        source = random.Random(0)
        for phase in PHASES:
            started.append(begin(file, place / "killed"))
            reach(lambda phase=phase: in_phase(place / "killed", phase), phase, started[-1], place / "killed")
            time.sleep(source.uniform(0, 0.3))
            assert started[-1].poll() is None, "it ended before it could be killed"
            kill(started[-1])
        started.append(begin(file, place / "killed"))
        finish(started[-1], place / "killed")
        finish(started[0], place / "whole")
        for process in started:
            assert_nothing_is_left(process.pid)
    finally:
        for process in started:
            process.kill()
            process.wait()
    return RunDir(place / "whole"), RunDir(place / "killed")


def steps(run_dir: RunDir) -> dict[tuple[int, int], tuple]:
    """The last time that each step was taken, and what it measured."""
    names = ("loss", "vft_loss", "alignment_loss", "grad_norm", "right_score", "wrong_score", "tokens")
    events = [event for event in read_events(run_dir) if event["event"] == "step"]
    return {(event["round"], event["global_step"]): tuple(event[name] for name in names) for event in events}


def test_a_killed_run_samples_the_same_groups(runs):
    whole, killed = map(Ledger, runs)
    for number in (0, 1):
        groups = whole.read_groups(number)
        assert len(groups) == 48
        assert killed.read_groups(number) == groups
        assert any(group.has_signal for group in groups) is (number > 0)
        assert killed.policy_version(number) == whole.policy_version(number)
    assert killed.trained_rounds() == [0, 1]


def test_a_killed_run_takes_the_same_steps(runs):
    whole, killed = map(steps, runs)
    assert len(whole) == 48 * (6 + 4)
    # A step's event may die with the driver, though its round was trained to the end; that is in the ledger.
    assert killed.items() <= whole.items()
    timeless = ("loss", "vft_loss", "alignment_loss", "grad_norm", "right_score", "wrong_score", "tokens", "steps")
    trained = [
        [
            (state.round, [state.metrics[name] for name in timeless])
            for state in Ledger(run_dir).checkpoints()
            if state.complete
        ]
        for run_dir in runs
    ]
    assert [number for number, _ in trained[0]] == [0, 1]
    assert trained[0] == trained[1]


def test_a_killed_run_ends_with_the_same_model(runs):
    for number in (0, 1):
        whole, killed = (
            {
                name: tensor
                for path in run_dir.local_path(run_dir.model(number)).glob("*.safetensors")
                for name, tensor in load_file(path).items()
            }
            for run_dir in runs
        )
        assert whole.keys() == killed.keys()
        assert all(torch.equal(whole[name], killed[name]) for name in whole)
