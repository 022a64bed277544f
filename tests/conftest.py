"""What tests of several parts share: tiny untrained models and a Ray of this process's own."""

import os
from pathlib import Path

import pytest
from tiny import LENGTH

from aft_ray.cluster.connect import start_ray
from jobs.tiny_model import build_tiny_model, build_tokenizer

# A Ray that one test starts must not ask another's for a token.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
# How often Ray Train looks at its workers, seconds; by default a tiny run waits longer for that than it trains.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Keeps the tests of a file in one process, and so all tests of the service, which takes long to start."""
    group = "service" if "reasoner" in getattr(item, "fixturenames", ()) else str(item.path)
    item.add_marker(pytest.mark.xdist_group(group))


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
