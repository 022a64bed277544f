"""Samplers placed otherwise (two processes an engine, the train workers' place in turn) give the very same run."""

import os
import signal
import threading
import time
from io import StringIO

import pytest
import torch
from processes import descendants
from rich.console import Console
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from aft_ray import rounds
from aft_ray.ledger import Ledger
from aft_ray.observe.reporter import Reporter
from aft_ray.observe.summary import read_events
from aft_ray.run_dir import RunDir

pytestmark = [pytest.mark.usefixtures("ray_here"), pytest.mark.timeout(1200)]
SECOND_PROCESS = "VLLM::Worker_TP1"


def run(directory, model, **sampling) -> RunDir:
    config = tiny_config(
        directory,
        model,
        rounds={"evaluate_every": 1},
        sampling={"cpus_per_sampler": 2, **sampling},
        training={"zero_stage": 2},
    )
    with Reporter(RunDir(config.run_dir), Console(file=StringIO())) as reporter:
        assert rounds.run(config, reporter)
    return RunDir(config.run_dir)


@pytest.fixture(scope="module")
def plain(ray_here, tiny_model, tmp_path_factory) -> RunDir:
    return run(tmp_path_factory.mktemp("plain") / "run", tiny_model)


def events(run_dir, *names):
    return [event for event in read_events(run_dir) if event["event"] in names]


def assert_same_run(run_dir, plain, tolerance):
    candidates = [
        {group.question.id: [c.token_ids for c in group.candidates] for group in Ledger(one).read_groups(1)}
        for one in (run_dir, plain)
    ]
    assert candidates[0] == candidates[1]
    assert len(candidates[0]) == 40
    models = [
        AutoModelForCausalLM.from_pretrained(one.local_path("rounds/0001/model")).state_dict()
        for one in (run_dir, plain)
    ]
    for name, tensor in models[0].items():
        torch.testing.assert_close(tensor, models[1][name], rtol=0, atol=tolerance, msg=name)


def test_two_processes_sample_and_take_weights_as_one_does_though_one_of_them_is_killed(tiny_model, plain, tmp_path):
    """The model is tied, and its versions 0 and 1 are published into both processes."""
    killed = []

    def kill() -> None:
        """Kills the second process of the engine once it answers."""
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline and not killed:
            if events(RunDir(str(tmp_path / "run")), "sampler_joined"):
                killed.extend(descendants(SECOND_PROCESS))
                for process in killed:
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.1)

    killer = threading.Thread(target=kill)
    killer.start()
    two = run(tmp_path / "run", tiny_model, tensor_parallel_size=2)
    killer.join()
    assert len(killed) == 1
    (lost,) = events(two, "sampler_lost")
    assert "its process or node ended" in lost["reason"]
    assert len(events(two, "sampler_joined")) == 2
    assert [event["version"] for event in events(two, "published")] == [0, 1]
    assert descendants(SECOND_PROCESS) == []  # the engine's processes end with their actor
    assert_same_run(two, plain, 1e-6)


def test_in_turn_with_the_train_workers_nobody_works_out_of_turn(tiny_model, plain, tmp_path):
    shared = run(tmp_path / "run", tiny_model, colocate=True)
    assert_same_run(shared, plain, 0)
    order = [(event["event"], event["version"]) for event in events(shared, "published", "evaluated", "sampled")]
    assert order == [("published", 0), ("evaluated", 0), ("sampled", 0), ("published", 1), ("evaluated", 1)]
    assert [event["round"] for event in events(shared, "trained")] == [0, 1]
    # What vLLM says on the CPU, where it has nothing to do: it slept while round 1 was trained, then its parts woke.
    said = shared.read_bytes("logs/sampler-0.log").decode()
    assert said.count("sleep mode is not supported on CPU") == 1 + 2
