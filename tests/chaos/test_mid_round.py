"""Train workers and drivers that are killed inside a round continue after the step of the last training state there."""

import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from drivers import assert_nothing_is_left, begin, finish, kill_a_worker, kill_with_its_ray, log_of, reach
from safetensors.torch import load_file
from tiny import tiny_tree

from aft_ray.observe.summary import read_events
from aft_ray.storage.ledger import Ledger
from aft_ray.storage.run_dir import RunDir

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

QUESTIONS, STEPS = 24, 576  # in each round
EVERY = {"checkpoint_every_s": 0.5}


class Kill(NamedTuple):
    """How far a run was when a process was killed.

    Attributes:
        saved: the step of the last state inside the round whose event was there.
    """

    round: int
    saved: int


def write_config(place: Path, model: Path, per_step: int = 1, **sections) -> Path:
    epochs = STEPS * per_step // QUESTIONS
    tree = tiny_tree(
        place / "run",
        model,
        objective={"name": "vft"},  # without samplers
        data={"train_limit": QUESTIONS},
        vft={"questions_per_step": per_step, "epochs": epochs},
        **sections,
    )
    tree["training"] |= {"groups_per_step": per_step, "epochs": epochs}
    file = place / "run.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def of_round(run_dir: Path, event: str, number: int) -> list[int]:
    """The steps that the events of a round name, in order."""
    events = read_events(RunDir(run_dir)) if run_dir.exists() else []
    return [one["step"] for one in events if one["event"] == event and one["round"] == number]


def inside(process: subprocess.Popen, run_dir: Path, number: int) -> Kill:
    """Waits until a round has a training state in it, and some more steps have been taken."""

    def is_there() -> bool:
        saved, taken = of_round(run_dir, "checkpoint", number), of_round(run_dir, "step", number)
        return bool(saved) and bool(taken) and taken[-1] >= saved[-1] + 5

    reach(is_there, f"a training state inside round {number}", process, run_dir)
    saved = of_round(run_dir, "checkpoint", number)[-1]
    assert process.poll() is None, "it ended before it could be killed"
    return Kill(number, saved)


def killed_run(file: Path, run_dir: Path, changed: tuple[str, ...]) -> list[Kill]:
    """A run of which a train worker is killed inside round 0, and the driver with its Ray inside round 1.

    Args:
        changed: what is changed in the config when it is started again.
    """
    processes, kills = [begin(file, run_dir)], []
    try:
        kills.append(inside(processes[-1], run_dir, 0))
        kill_a_worker(processes[-1])
        kills.append(inside(processes[-1], run_dir, 1))
        kill_with_its_ray(processes[-1])
        processes.append(begin(file, run_dir, *changed))
        finish(processes[-1], run_dir)
        for process in processes:
            assert_nothing_is_left(process.pid)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return kills


def whole_run(file: Path, run_dir: Path) -> None:
    process = begin(file, run_dir)
    try:
        finish(process, run_dir)
        assert_nothing_is_left(process.pid)
    finally:
        process.kill()
        process.wait()


def losses(run_dir: Path, number: int) -> dict[int, tuple[float, float]]:
    """The loss and the gradient norm of each step of a round, as it was taken last."""
    events = read_events(RunDir(run_dir))
    steps = [one for one in events if one["event"] == "step" and one["round"] == number]
    return {one["step"]: (one["loss"], one["grad_norm"]) for one in steps}


def averages(run_dir: Path) -> list[dict[str, float]]:
    """What the ledger says of the steps of each round together."""
    names = ("steps", "tokens", "loss", "vft_loss", "grad_norm", "groups")
    records = [one for one in Ledger(RunDir(run_dir)).checkpoints() if one.complete]
    assert [one.round for one in records] == [0, 1]
    return [{name: one.metrics[name] for name in names} for one in records]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    store = RunDir(run_dir)
    files = store.local_path(store.model(1)).glob("*.safetensors")
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def assert_continued(run_dir: Path, kills: list[Kill]) -> None:
    """After each kill the round went on from a state that is no older than the one that was seen before."""
    events = read_events(RunDir(run_dir))
    for number, saved in kills:
        of_this = [one for one in events if one.get("round") == number]
        (at,) = [index for index, one in enumerate(of_this) if one["event"] == "resumed"]
        resumed = of_this[at]["step"]
        before, after = (
            # Events that were sent shortly one after the other may be written in the other order.
            sorted(one["step"] for one in part if one["event"] == "step")
            for part in (of_this[:at], of_this[at + 1 :])
        )
        durable = [one["step"] for one in of_this[:at] if one["event"] == "checkpoint"]
        # Only the steps since the last durable state are taken again.
        assert resumed >= durable[-1] >= saved
        assert before == list(range(1, before[-1] + 1))
        assert after == list(range(resumed + 1, STEPS + 1))
    store = RunDir(run_dir)
    # Nothing is left of the states inside rounds, nor of the saves that were killed.
    assert store.checkpoints() == [store.checkpoint(0), store.checkpoint(1)]
    assert [store.verify_manifest(path) for path in store.checkpoints()] == [[], []]
    said = log_of(run_dir).read_text()
    assert f"round 1: training goes on after step {of_round(run_dir, 'resumed', 1)[0]} of {STEPS}" in said
    assert "the training state after step" in said


def test_one_worker_takes_the_same_steps_to_the_last_bit(tiny_model, tmp_path):
    lora = {"rank": 4, "alpha": 8, "dropout": 0.2}  # the random numbers of dropout go on, too
    file = write_config(tmp_path, tiny_model, lora=lora, training=EVERY)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    kills = killed_run(file, killed, ())
    whole_run(file, whole)
    assert_continued(killed, kills)
    for number in (0, 1):
        expected = losses(whole, number)
        assert len(expected) == STEPS
        assert losses(killed, number).items() <= expected.items()
    assert losses(killed, 0) == losses(whole, 0)
    assert averages(killed) == averages(whole)
    expected, found = weights(whole), weights(killed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_two_workers_with_sharded_weights_go_on_as_one(tiny_model, tmp_path):
    training = {"workers": 2, "zero_stage": 3, **EVERY}
    file = write_config(tmp_path, tiny_model, per_step=2, training=training)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    kills = killed_run(file, killed, ("training.workers=1", "training.zero_stage=3"))
    whole_run(file, whole)
    assert_continued(killed, kills)
    for number in (0, 1):
        expected, found = losses(whole, number), losses(killed, number)
        assert len(expected) == STEPS
        for step, values in found.items():
            assert values == pytest.approx(expected[step], rel=2e-3, abs=1e-4)
    for found, expected in zip(averages(killed), averages(whole), strict=True):
        assert found == pytest.approx(expected, rel=1e-3)
    expected, found = weights(whole), weights(killed)
    assert expected.keys() == found.keys()
    assert all(torch.allclose(expected[name], found[name], atol=1e-4) for name in expected)


def test_a_damaged_state_is_named_and_the_one_before_it_is_taken(tiny_model, tmp_path):
    file = write_config(tmp_path, tiny_model, training={**EVERY, "keep_checkpoints": 3})
    run_dir = tmp_path / "run"
    process = begin(file, run_dir)
    try:
        inside(process, run_dir, 1)
        reach(lambda: len(of_round(run_dir, "checkpoint", 1)) >= 2, "a second state in round 1", process, run_dir)
        kill_with_its_ray(process)
        ledger = Ledger(RunDir(run_dir))
        newest = ledger.last_checkpoint()
        before = ledger.last_checkpoint({newest.checkpoint})
        assert (newest.round, before.round, newest.complete, before.complete) == (1, 1, False, False)
        (shard,) = (run_dir / newest.checkpoint).rglob("*.pt")
        contents = bytearray(shard.read_bytes())
        contents[len(contents) // 2] ^= 1
        shard.write_bytes(contents)
        process = begin(file, run_dir)
        finish(process, run_dir)
        assert_nothing_is_left(process.pid)
    finally:
        process.kill()
        process.wait()
    said = log_of(run_dir).read_text()
    assert (
        f"{shard} is corrupted: its sha256 is not that of the manifest; training goes on from the state befor" in said
    )
    assert of_round(run_dir, "resumed", 1) == [before.step]
    whole_run(file, tmp_path / "whole")
    assert losses(run_dir, 1).items() <= losses(tmp_path / "whole", 1).items()
    assert averages(run_dir) == averages(tmp_path / "whole")
