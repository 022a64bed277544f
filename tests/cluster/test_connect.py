"""A Ray of one's own, started on a machine that is too busy for it."""

import psutil
import pytest
import ray
from processes import descendants

from aft_ray.cluster import connect as cluster
from aft_ray.cluster.connect import start_ray
from aft_ray.config.run import ConfigError

LATE = "The current node timed out during startup. This could happen because some of the raylet failed to startup."


def heads() -> list[int]:
    return [pid for pid in descendants("gcs_server") if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def late(monkeypatch):
    """How often a Ray, all of whose processes are started, is to be found too late from now on."""
    times, found = [0], ray._private.services.get_node

    def get_node(*arguments):
        if times[0]:
            times[0] -= 1
            raise TimeoutError(LATE)
        return found(*arguments)

    monkeypatch.setattr("ray._private.services.get_node", get_node)
    yield times
    ray.shutdown()


def test_a_ray_that_comes_up_too_late_is_ended_and_another_started(late):
    before = heads()
    late[0] = 1
    start_ray(num_cpus=1, log_to_driver=False)
    assert ray.is_initialized()
    assert len(heads()) == len(before) + 1
    assert late == [0]


def test_it_is_given_up_in_one_sentence_and_nothing_is_left(late, monkeypatch):
    monkeypatch.setattr(cluster, "_STARTS", 2)
    before = heads()
    late[0] = 2
    with pytest.raises(ConfigError, match="Ray did not come up on this machine within half a minute, 2 times") as error:
        start_ray(num_cpus=1, log_to_driver=False)
    assert "\n" not in str(error.value)
    assert not ray.is_initialized()
    assert heads() == before
