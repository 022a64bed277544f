"""Configs of runs small enough for a test."""

from pathlib import Path
from typing import Any

from aft_ray.config.run import RunConfig, parse_config

# The context of the tiny models, tokens.
LENGTH = 160


def tiny_tree(run_dir: Path, model: Path, /, **sections: Any) -> dict:
    """The config of a run small enough for a test, as a nested dict, with `sections` merged into it."""
    tree = {
        "run_dir": str(run_dir),
        "model": {"name": str(model), "dtype": "float32", "max_length": LENGTH},
        "data": {"train_limit": 40, "validation_limit": 8, "test_limit": 8, "arithmetic": {"max_steps": 2}},
        "vft": {"epochs": 1, "learning_rate": 1e-3, "questions_per_step": 16},
        "rounds": {"count": 1, "max_staleness": 0, "evaluate_every": 0, "timeout_s": 1200},
        "sampling": {"max_tokens": 24, "k": 3, "groups_per_file": 20, "batch_size": 8, "kv_cache_gib": 0.25},
        "training": {"learning_rate": 5e-4, "groups_per_step": 16, "timeout_s": 900},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section} if isinstance(section, dict) else section
    return tree


def tiny_config(run_dir: Path, model: Path, /, **sections: Any) -> RunConfig:
    return parse_config(tiny_tree(run_dir, model, **sections))
