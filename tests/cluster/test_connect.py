"""Starting Ray on a machine that is so busy that the start times out."""

import psutil
import pytest
import ray
from processes import descendants

from aft_ray.cluster import connect
from aft_ray.cluster.connect import start_ray
from aft_ray.config.run import ConfigError

TIMED_OUT = "The current node timed out during startup. This could happen because some of the raylet failed to startup."


def gcs_servers() -> list[int]:
    return [pid for pid in descendants("gcs_server") if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def timeouts(monkeypatch):
    """A list whose only item says how many of the next starts time out after all processes have been started."""
    remaining, original = [0], ray._private.services.get_node

    def get_node(*arguments):
        if remaining[0]:
            remaining[0] -= 1
            raise TimeoutError(TIMED_OUT)
        return original(*arguments)

    monkeypatch.setattr("ray._private.services.get_node", get_node)
    yield remaining
    ray.shutdown()


def test_a_start_that_timed_out_is_ended_and_repeated(timeouts):
    before = gcs_servers()
    timeouts[0] = 1
    start_ray(num_cpus=1, log_to_driver=False)
    assert ray.is_initialized()
    assert len(gcs_servers()) == len(before) + 1
    assert timeouts == [0]


def test_after_the_last_timeout_one_sentence_is_raised_and_no_process_is_left(timeouts, monkeypatch):
    monkeypatch.setattr(connect, "_STARTS", 2)
    before = gcs_servers()
    timeouts[0] = 2
    with pytest.raises(ConfigError, match="Ray did not come up on this machine within half a minute, 2 times") as error:
        start_ray(num_cpus=1, log_to_driver=False)
    assert "\n" not in str(error.value)
    assert not ray.is_initialized()
    assert gcs_servers() == before
