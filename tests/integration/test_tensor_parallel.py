"""An engine of two processes in a run: the same candidates and the same model as with one, also when a process dies."""

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
SECOND = "VLLM::Worker_TP1"


def run(directory, model, **sampling):
    config = tiny_config(directory, model, sampling={"cpus_per_sampler": 2, **sampling})
    with Reporter(RunDir(config.run_dir), Console(file=StringIO())) as reporter:
        assert rounds.run(config, reporter)
    return config


def candidates(config):
    groups = Ledger(RunDir(config.run_dir)).read_groups(1)
    return {group.question.id: [candidate.token_ids for candidate in group.candidates] for group in groups}


def weights(config):
    return AutoModelForCausalLM.from_pretrained(
        RunDir(config.run_dir).local_path("rounds/0001/model")
    ).state_dict()  # fmt: skip


def events(config, name):
    return [event for event in read_events(RunDir(config.run_dir)) if event["event"] == name]


def test_two_processes_sample_and_take_weights_as_one_does_though_one_of_them_is_killed(tiny_model, tmp_path):
    """The model is tied, and its versions 0 and 1 are published into both processes."""
    killed = []

    def kill() -> None:
        """Kills the second process of the engine once it answers."""
        deadline = time.monotonic() + 600
        log = RunDir(str(tmp_path / "two"))
        while time.monotonic() < deadline and not killed:
            if any(event["event"] == "sampler_joined" for event in read_events(log)):
                killed.extend(descendants(SECOND))
                for process in killed:
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.1)

    killer = threading.Thread(target=kill)
    killer.start()
    two = run(tmp_path / "two", tiny_model, tensor_parallel_size=2)
    killer.join()
    assert len(killed) == 1
    (lost,) = events(two, "sampler_lost")
    assert "its process or node ended" in lost["reason"]
    assert len(events(two, "sampler_joined")) == 2
    assert [event["version"] for event in events(two, "published")] == [0, 1]
    assert descendants(SECOND) == []  # the engine's processes end with their actor

    one = run(tmp_path / "one", tiny_model)
    assert candidates(two) == candidates(one)
    assert len(candidates(two)) == 40
    theirs = weights(one)
    for name, tensor in weights(two).items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6, msg=name)
