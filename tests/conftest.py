"""What tests of several parts share: tiny untrained models, a Ray of this process's own, and configs for both."""

import os
from pathlib import Path
from typing import Any

import pytest

from aft_ray.config import RunConfig, parse_config
from aft_ray.tasks.arithmetic_model import build_tiny_model

# A Ray that one test starts must not ask another's for a token.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
LENGTH = 160


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

    ray.init(address="local", num_cpus=8, object_store_memory=256 << 20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def tiny_tree(run_dir: Path, model: Path, /, **sections: Any) -> dict:
    """A run small enough for a test, as the nested dict of its config; `sections` are merged in."""
    tree = {
        "run_dir": str(run_dir),
        "model": {"name": str(model), "dtype": "float32", "max_length": LENGTH},
        "data": {"train_limit": 40, "validation_limit": 8, "test_limit": 8, "arithmetic": {"max_steps": 2}},
        "vft": {"epochs": 1, "learning_rate": 1e-3, "questions_per_step": 16},
        "rounds": {"count": 1, "max_staleness": 0, "evaluate_every": 0, "timeout_s": 300},
        "sampling": {"max_tokens": 24, "k": 3, "groups_per_file": 8, "batch_size": 8, "kv_cache_gib": 0.25},
        "training": {"learning_rate": 5e-4, "groups_per_step": 16, "timeout_s": 300},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section} if isinstance(section, dict) else section
    return tree


def tiny_config(run_dir: Path, model: Path, /, **sections: Any) -> RunConfig:
    return parse_config(tiny_tree(run_dir, model, **sections))
