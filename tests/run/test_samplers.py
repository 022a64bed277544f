"""A version whose weights are lost with the train workers is loaded when its model directory is there."""

import pytest

from aft_ray.coordination.coordinator import PeerFailed
from aft_ray.run.samplers import load_or_wait, wait_until_durable
from aft_ray.weights.version_manifest import VersionManifest, WeightsMissed

EARLY = VersionManifest(3, "model", ("a", "b"), (), receive_plan="objects", durable=False)


class Recorder:
    """The samplers, the coordinator and the terminal. The weights do not arrive the first `missed` times."""

    def __init__(self, missed):
        self.missed, self.calls, self.durable = missed, [], False

    def load(self, manifest):
        self.calls.append(manifest)
        self.missed -= 1
        if self.missed >= 0:
            raise WeightsMissed("sampler 0 did not get them")
        return ["loaded"]

    def is_durable(self, version):
        return self.durable

    def wait_durable(self, version, timeout_s):
        self.calls.append(f"wait {timeout_s} s for {version}")

    def say(self, line):
        self.line = line


def load(manifest, missed):
    recorder = Recorder(missed)
    loaded = load_or_wait(recorder, manifest, recorder, 60, recorder.say)
    return recorder, loaded


def test_weights_that_arrive_are_loaded_at_once():
    recorder, loaded = load(EARLY, 0)
    assert loaded == ["loaded"]
    assert recorder.calls == [EARLY]


def test_weights_that_are_lost_are_read_from_the_directory_once_it_is_written():
    recorder, loaded = load(EARLY, 1)
    assert loaded == ["loaded"]
    assert recorder.calls == [EARLY, "wait 60 s for 3", VersionManifest(3, "model", ("a", "b"), ())]
    assert recorder.line == "version 3: samplers wait until its model directory is written"


def test_a_directory_that_does_not_reach_an_engine_fails_the_update():
    for missed, manifest in ((2, EARLY), (1, EARLY.once_durable())):
        with pytest.raises(WeightsMissed):
            load(manifest, missed)


def test_nothing_waits_for_a_directory_that_is_complete():
    recorder = Recorder(0)
    wait_until_durable(EARLY.once_durable(), recorder, 60, recorder.say)
    recorder.durable = True
    wait_until_durable(EARLY, recorder, 60, recorder.say)
    assert recorder.calls == []


def test_a_directory_that_is_not_written_in_time_is_named():
    import asyncio

    from aft_ray.coordination.coordinator import Coordinator

    sentence = "waited 0 s for the model directory of policy version 3 to be written; rounds.timeout_s sets"
    with pytest.raises(PeerFailed, match=sentence):
        asyncio.run(Coordinator().wait_durable(3, 0.1))
