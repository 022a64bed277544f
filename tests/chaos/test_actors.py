"""Processes killed in the middle of a round: Ray starts them again, and the round has every question exactly once."""

import os
import signal
import threading
import time
from io import StringIO

import pytest
import ray
from processes import descendants
from rich.console import Console
from tiny import tiny_config

from aft_ray import rounds
from aft_ray.evaluation.evaluator import unanswered
from aft_ray.ledger import Ledger
from aft_ray.observe.reporter import Reporter
from aft_ray.observe.summary import read_events
from aft_ray.questions import load_tokenizer, prepare, questions_of_round
from aft_ray.run_dir import RunDir
from aft_ray.sampling.pool import SamplerPool
from aft_ray.sampling.stream import sample_round
from aft_ray.weights.publication import read_publication

pytestmark = [pytest.mark.usefixtures("ray_here"), pytest.mark.timeout(1200)]


def kill_at_work(actors: list) -> None:
    """Kills each sampler as soon as it has answered something, so that for a while none may be left."""
    for actor in actors:
        while not ray.get(actor.status.remote())["tokens"]:
            time.sleep(0.02)
        ray.kill(actor, no_restart=False)


def test_a_sampler_that_is_killed_catches_up_and_the_round_is_whole(tiny_model, tmp_path):
    config = tiny_config(
        tmp_path / "run",
        tiny_model,
        vft={"epochs": 0},
        data={"train_limit": 160},
        sampling={"samplers": 2, "batch_size": 4, "in_flight": 1, "groups_per_file": 16, "max_tokens": 60},
    )
    run_dir, tokenizer = RunDir(config.run_dir), load_tokenizer(config)
    questions = questions_of_round(config, prepare(config, "train", tokenizer).groups, 1)
    ledger, publication = Ledger(run_dir), read_publication(1, tiny_model)
    pool = SamplerPool.start(config, str(tiny_model), tokenizer.eos_token_id, None, None)
    pool.wait_ready(2)
    try:
        pool.load(publication)
        killer = threading.Thread(target=kill_at_work, args=(pool.actors,))
        killer.start()
        for written in sample_round(config, pool, publication, unanswered(questions, 1), run_dir):
            assert written.parked == ()
            assert ledger.commit(written.file)
        killer.join()
        deadline = time.monotonic() + 120
        while [status["version"] for status in pool.statuses()].count(1) < 1:
            assert time.monotonic() < deadline
            time.sleep(0.5)
    finally:
        pool.close()
    groups = ledger.read_groups(1)
    assert [group.question.id for group in groups] == [group.question.id for group in questions]
    assert {group.policy_version for group in groups} == {1}
    assert {len(group.candidates) for group in groups} == {config.sampling.k}


def test_a_train_worker_that_is_killed_starts_again_and_every_round_is_trained(tiny_model, tmp_path):
    config = tiny_config(
        tmp_path / "run",
        tiny_model,
        objective={"name": "vft"},
        rounds={"count": 2},
        training={"epochs": 6, "groups_per_step": 8},
    )
    run_dir = RunDir(config.run_dir)
    killed = []

    def kill() -> None:
        """Kills the worker once it is some steps into round 1."""
        deadline = time.monotonic() + 240
        while not killed and time.monotonic() < deadline:
            steps = [e for e in read_events(run_dir) if e["event"] == "step" and e["round"] == 1]
            if len(steps) > 2:
                killed.extend(descendants("RayTrainWorker"))
                for process in killed:
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.05)

    killer = threading.Thread(target=kill)
    killer.start()
    with Reporter(run_dir, Console(file=StringIO())) as reporter:
        assert rounds.run(config, reporter)
    killer.join()
    assert len(killed) == 1
    ledger = Ledger(run_dir)
    assert ledger.trained_rounds() == [0, 1, 2]
    trained = [event for event in read_events(run_dir) if event["event"] == "trained"]
    assert [(event["round"], event["steps"], event["groups"]) for event in trained] == [
        (0, 3, 40),
        (1, 30, 40),
        (2, 30, 40),
    ]
    steps = [e["step"] for e in read_events(run_dir) if e["event"] == "step" and e["round"] == 1]
    assert steps.count(1) == 2  # begun twice, from the checkpoint of round 0
    assert steps[-30:] == list(range(1, 31))
    assert [len(ledger.read_groups(number)) for number in (0, 1, 2)] == [40, 40, 40]
