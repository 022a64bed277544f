"""Checkpoints on slow storage: training continues meanwhile, and a killed worker continues from a complete one."""

import os
import signal
import threading
import time
from io import StringIO

import pytest
import ray
import slow_storage
from processes import descendants
from rich.console import Console
from tiny import tiny_config

from aft_ray.observe.reporter import Reporter
from aft_ray.observe.summary import read_events
from aft_ray.run import launch
from aft_ray.sampling.round import RunFailed
from aft_ray.storage.ledger import Ledger
from aft_ray.storage.run_dir import MANIFEST, RunDir

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_here"), pytest.mark.timeout(900)]


def test_a_worker_that_is_killed_while_its_checkpoint_is_saved(tiny_model, tmp_path, monkeypatch):
    config = tiny_config(tmp_path / "run", tiny_model, objective={"name": "vft"}, rounds={"count": 2})
    run_dir, published = RunDir(config.run_dir), {}
    ray.cloudpickle.register_pickle_by_value(slow_storage)  # the workers cannot import modules of the tests
    monkeypatch.setattr(launch, "RunDir", slow_storage.SlowRunDir)

    def kill() -> None:
        """Kills the worker when version 1 is published and its checkpoint is not complete yet."""
        deadline = time.monotonic() + 400
        while not run_dir.is_complete(run_dir.model(1)) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1.0)
        published["there"] = run_dir.read_json(f"{run_dir.model(1)}/{MANIFEST}")
        published["made"] = run_dir.local_path(run_dir.model(1)).stat().st_ino
        published["durable"] = run_dir.is_complete(run_dir.checkpoint(1))
        for process in descendants("RayTrainWorker"):
            os.kill(process, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with Reporter(run_dir, Console(file=StringIO())) as reporter:
        assert launch.run(config, reporter)
    killer.join()
    assert published["durable"] is False
    ledger = Ledger(run_dir)
    assert [(one.round, one.complete) for one in ledger.checkpoints()] == [(0, True), (1, True), (2, True)]
    # Version 1 is unchanged, although its round was trained twice.
    assert run_dir.local_path(run_dir.model(1)).stat().st_ino == published["made"]
    assert run_dir.verify_manifest(run_dir.model(1)) == []
    assert run_dir.read_json(f"{run_dir.model(1)}/{MANIFEST}") == published["there"]
    events = [e for e in read_events(run_dir) if e["event"] in ("step", "trained")]
    trained = [(e["round"], e["steps"], e["groups"]) for e in events if e["event"] == "trained"]
    assert trained == [(0, 3, 40), (1, 3, 40), (2, 3, 40)]
    # Round 1 was started twice from the checkpoint of round 0, and all its steps were taken each time.
    assert [e["step"] for e in events if e["event"] == "step" and e["round"] == 1] == [1, 2, 3] * 2
    # The first step of a round was taken before the checkpoint of the previous round was complete.
    for number in (1, 2):
        stepped = next(i for i, e in enumerate(events) if e["event"] == "step" and e["round"] == number)
        saved = next(i for i, e in enumerate(events) if e["event"] == "trained" and e["round"] == number - 1)
        assert stepped < saved
    for number in (0, 1, 2):
        assert run_dir.is_complete(run_dir.checkpoint(number)) or number == 0  # the last two are kept
    assert all(e["checkpoint_s"] >= 5 for e in events if e["event"] == "trained")


def test_a_checkpoint_that_cannot_be_saved_ends_the_run_in_one_sentence(tiny_model, tmp_path, monkeypatch):
    config = tiny_config(tmp_path / "run", tiny_model, objective={"name": "vft"}, rounds={"count": 2})
    ray.cloudpickle.register_pickle_by_value(slow_storage)
    monkeypatch.setattr(launch, "RunDir", slow_storage.FullRunDir)
    with Reporter(RunDir(config.run_dir), Console(file=StringIO())) as reporter:
        sentence = "the checkpoint of round 1 could not be saved: cannot write .*: No space left on device; make room"
        with pytest.raises(RunFailed, match=sentence) as error:
            launch.run(config, reporter)
    assert "\n" not in str(error.value)
    # Round 0 counts as trained. Version 1 is published, but its round does not count as trained.
    assert Ledger(RunDir(config.run_dir)).trained_rounds() == [0]
