"""Between the moment when engines take a version from memory and the moment when it is durable."""

import os
import signal
import threading
from io import StringIO

import held_storage
import pytest
import ray
from processes import descendants
from rich.console import Console
from tiny import tiny_config

from aft_ray.observe.reporter import Reporter
from aft_ray.observe.summary import read_events
from aft_ray.run import launch
from aft_ray.sampling.round import RunFailed
from aft_ray.storage.ledger import Ledger
from aft_ray.storage.run_dir import RunDir

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_here"), pytest.mark.timeout(900)]


def two_rounds(directory, model, transport, **rounds):
    """The config of two rounds from the given model. A round has many group files, and one sampler answers it."""
    return tiny_config(
        directory / "run",
        model,
        vft={"epochs": 0},
        rounds={"count": 2, **rounds},
        sampling={"groups_per_file": 4, "batch_size": 4, "in_flight": 1},
        weights={"transport": transport, "bucket_mib": 1, "timeout_s": 120},
    )


def run(config, monkeypatch, storage=RunDir) -> None:
    ray.cloudpickle.register_pickle_by_value(held_storage)  # the workers cannot import modules of the tests
    monkeypatch.setattr(launch, "RunDir", storage)
    with Reporter(RunDir(config.run_dir), Console(file=StringIO())) as reporter:
        assert launch.run(config, reporter)


def group_files(run_dir: RunDir) -> dict[str, bytes]:
    """The recorded group files of round 2 with their contents."""
    return {file.path: run_dir.read_bytes(file.path) for file in Ledger(run_dir).group_files(2)}


def assert_nothing_was_sampled_twice(run_dir: RunDir, before: dict[str, bytes]) -> None:
    after = group_files(run_dir)
    assert before
    assert {path: after.get(path) for path in before} == before
    groups = Ledger(run_dir).read_groups(2)
    assert len(groups) == len({group.question.id for group in groups}) == 40
    assert {group.policy_version for group in groups} == {1}
    assert Ledger(run_dir).trained_rounds() == [1, 2]
    for number in (1, 2):
        assert run_dir.verify_manifest(run_dir.model(number)) == []


def steps_of_round_1(run_dir: RunDir) -> list[int]:
    return [event["step"] for event in read_events(run_dir) if event["event"] == "step" and event["round"] == 1]


@pytest.mark.parametrize("transport", ["object_store", "nccl"])
def test_slow_storage_delays_neither_the_engines_nor_the_next_round(tiny_model, tmp_path, monkeypatch, transport):
    config = two_rounds(tmp_path, tiny_model, transport)
    run(config, monkeypatch, held_storage.SlowModelRunDir)
    run_dir = RunDir(config.run_dir)
    events = [event for event in read_events(run_dir) if event["event"] in ("published", "sampled", "step", "trained")]
    (durable,) = (i for i, event in enumerate(events) if event["event"] == "trained" and event["round"] == 1)
    earlier = events[:durable]
    # The ledger has round 1 when its directory is durable. By then engines have answered round 2 with its version.
    assert 1 in [event["version"] for event in earlier if event["event"] == "published"]
    assert [event["round"] for event in earlier if event["event"] == "sampled"] == [1, 2]
    assert any(event["event"] == "step" and event["round"] == 2 for event in earlier)
    assert events[durable]["publish_s"] < events[durable]["directory_s"]
    assert Ledger(run_dir).trained_rounds() == [1, 2]
    for number in (1, 2):
        assert run_dir.verify_manifest(run_dir.model(number)) == []


def test_workers_that_are_killed_before_a_version_is_durable_train_it_again(tiny_model, tmp_path, monkeypatch):
    config = two_rounds(tmp_path, tiny_model, "nccl")
    run_dir, before, durable, ended = RunDir(config.run_dir), {}, [], threading.Event()

    def kill() -> None:
        """Kills the train worker when engines have answered with version 1, which is not durable yet."""
        while not before and not ended.wait(0.05):
            before.update(group_files(run_dir))
        durable.append(run_dir.is_complete(run_dir.model(1)))
        for process in descendants("RayTrainWorker"):
            os.kill(process, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        run(config, monkeypatch, held_storage.HeldModelRunDir)
    finally:
        ended.set()
        killer.join()
    assert durable == [False]
    assert_nothing_was_sampled_twice(run_dir, before)
    assert steps_of_round_1(run_dir) == [1, 2, 3] * 2


def test_a_model_that_cannot_be_written_ends_the_run_and_a_resumed_run_samples_nothing_again(
    tiny_model, tmp_path, monkeypatch
):
    config = two_rounds(tmp_path, tiny_model, "object_store")
    sentence = (
        r"^the model directory of version 1 could not be written: cannot write .*: No space left on device; [^\n]*$"
    )
    with pytest.raises(RunFailed, match=sentence):
        run(config, monkeypatch, held_storage.FullModelRunDir)
    run_dir = RunDir(config.run_dir)
    assert Ledger(run_dir).trained_rounds() == []
    assert not run_dir.is_complete(run_dir.model(1))
    before = group_files(run_dir)
    run(config, monkeypatch)
    assert_nothing_was_sampled_twice(run_dir, before)
    assert steps_of_round_1(run_dir) == [1, 2, 3] * 2
