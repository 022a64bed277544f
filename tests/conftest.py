"""What tests of several parts share: tiny untrained models and a Ray of this process's own."""

import os
from pathlib import Path
from typing import Any

import pytest
from tiny import LENGTH
from xdist.scheduler import LoadFileScheduling

from aft_ray.cluster.connect import start_ray
from jobs.tiny_model import build_tiny_model, build_tokenizer

# A Ray that one test starts must not ask another's for a token.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
# How often Ray Train looks at its workers, seconds; by default a tiny run waits longer for that than it trains.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")


class OneProcessForEachFile(LoadFileScheduling):
    """Gives each file to one of the processes, and all files of the service to the same one: it takes long to start."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return "tests/serving" if file.startswith("tests/serving/") else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneProcessForEachFile:
    return OneProcessForEachFile(config, log)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A Llama with tied embeddings, as most small models have."""
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tied", 1, 64, 2, 2, True, LENGTH)


@pytest.fixture(scope="session")
def untied_model(tmp_path_factory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "untied", 2, 64, 2, 2, False, LENGTH)


@pytest.fixture(scope="module")
def ray_here():
    """A Ray on this machine for the tests of a module, with more logical CPUs than a tiny run needs."""
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    start_ray(num_cpus=8, object_store_memory=256 << 20, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()
