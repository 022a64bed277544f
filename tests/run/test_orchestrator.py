"""The order of a round: what the orchestrator calls, one after the other, with collaborators that write it down."""

import pytest
from tiny import tiny_config

from aft_ray.run.orchestrator import Orchestrator
from aft_ray.storage.ledger import Ledger
from aft_ray.storage.run_dir import RunDir
from aft_ray.weights.version_manifest import VersionManifest


def manifest(version, place="published"):
    return VersionManifest(version, place, (), ())


class Recorder:
    """Every collaborator of the orchestrator. `newest`: the version that training has published at each wait."""

    def __init__(self, newest):
        self.calls, self.newest = [], list(newest)

    def publish(self, offered):
        self.calls.append(f"offer {offered.version} from {offered.model}")

    def wait_version(self, version, timeout_s):
        assert timeout_s == 1200
        self.calls.append(f"wait for {version}")
        return manifest(self.newest.pop(0)), 1.5

    def set_ready(self, number):
        self.calls.append(f"round {number} is ready")

    def load(self, loaded):
        self.calls.append(f"load {loaded.version} from {loaded.model}")

    def release(self):
        self.calls.append("release")

    def evaluate_if_due(self, loaded):
        self.calls.append(f"evaluate {loaded.version}")

    def sample(self, number, sampled_by, waited_s):
        assert waited_s == 1.5
        self.calls.append(f"sample {number} with {sampled_by.version}")

    def write_references(self, number):
        self.calls.append(f"references of {number}")


def run(tmp_path, first_round, newest, **rounds):
    rounds = {"count": 2, "max_staleness": 1, "timeout_s": 1200} | rounds
    config = tiny_config(tmp_path / "run", tmp_path / "model", rounds=rounds)
    recorder, ledger = Recorder(newest), Ledger(RunDir(tmp_path / "run"))
    orchestrator = Orchestrator(
        config, ledger, recorder, recorder, recorder, recorder, lambda version: manifest(version, "disk")
    )
    orchestrator.run(first_round)
    return recorder.calls, ledger


def test_rounds_of_a_new_run(tmp_path):
    calls, ledger = run(tmp_path, 0, newest=[0, 0, 1, 2])
    assert calls == [
        "references of 0", "release", "round 0 is ready",
        "wait for 0", "load 0 from published", "evaluate 0", "sample 1 with 0", "release", "round 1 is ready",
        # With a staleness of 1, round 2 is sampled by version 0 while round 1 is trained.
        "wait for 0", "load 0 from published", "evaluate 0", "sample 2 with 0", "release", "round 2 is ready",
        "wait for 1", "load 1 from published", "evaluate 1", "release",
        "wait for 2", "load 2 from published", "evaluate 2", "release",
    ]  # fmt: skip
    assert [ledger.policy_version(number) for number in (1, 2)] == [0, 0]


def test_without_staleness_each_round_waits_for_the_one_before(tmp_path):
    calls, ledger = run(tmp_path, 1, newest=[0, 1, 2], max_staleness=0)
    assert calls[0] == "offer 0 from disk"
    assert [call for call in calls if call.startswith(("wait", "sample"))] == [
        "wait for 0", "sample 1 with 0", "wait for 1", "sample 2 with 1", "wait for 2",
    ]  # fmt: skip
    assert [ledger.policy_version(number) for number in (1, 2)] == [0, 1]


def test_a_round_that_was_begun_goes_on_with_the_version_that_it_was_begun_with(tmp_path):
    Ledger(RunDir(tmp_path / "run")).record_policy_version(2, 0)
    calls, ledger = run(tmp_path, 2, newest=[1, 1, 2])
    assert calls[:4] == ["offer 1 from disk", "wait for 0", "load 0 from disk", "evaluate 0"]
    assert calls[4] == "sample 2 with 0"
    assert ledger.policy_version(2) == 0


def test_a_round_that_was_begun_waits_for_a_version_that_was_lost_before_it_was_durable(tmp_path):
    """Round 2 was begun with version 1, whose round has to be trained again; version 0 would be fresh enough for it."""
    Ledger(RunDir(tmp_path / "run")).record_policy_version(2, 1)
    calls, ledger = run(tmp_path, 1, newest=[0, 1, 1, 2])
    assert [call for call in calls if call.startswith(("wait", "load", "sample"))][:6] == [
        "wait for 0", "load 0 from published", "sample 1 with 0",
        "wait for 1", "load 1 from published", "sample 2 with 1",
    ]  # fmt: skip
    assert ledger.policy_version(2) == 1


def test_an_error_of_a_collaborator_ends_the_run_at_once(tmp_path):
    with pytest.raises(IndexError):  # no version comes any more
        run(tmp_path, 1, newest=[0])
    assert Ledger(RunDir(tmp_path / "run")).policy_version(2) is None
