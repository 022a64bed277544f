"""Parsing of the arguments of `aft-ray evaluate`: runs, models, files of answers, and the config to measure them.

Invariants: a wrong argument is reported before any engine starts. All targets get the questions of one config.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from aft_ray.config.run import ConfigError, ModelConfig, RunConfig, load_config
from aft_ray.storage.run_dir import RunDir
from aft_ray.storage.versions import find_run, find_version, read_config

_OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_]+)*=")


@dataclass(frozen=True, slots=True)
class Target:
    """One model or file of answers to measure.

    Attributes:
        label: the title of its column in tables.
        source: a model directory or hub name; for kind "file" the path of the file (or directory) of answers.
        name: its part of the names of output files.
        argument: the argument of the command line.
        model: the `model` section of the run's config; None: that of the common config is used.
        run_dir: the run that the model belongs to; None if it belongs to none.
    """

    label: str
    source: str
    kind: Literal["model", "file"] = "model"
    name: str = ""
    argument: str = ""
    model: ModelConfig | None = None
    run_dir: RunDir | None = None


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """All targets in the order of the command line, and their common config; None if there are only files."""

    targets: list[Target]
    config: RunConfig | None


def plan_evaluation(arguments: Sequence[str], config_file: Path | None) -> EvaluationPlan:
    """Parses targets and `key.sub=value` overrides.

    Raises:
        ConfigError: an argument is wrong; the message is one sentence.
    """
    overrides = [argument for argument in arguments if _OVERRIDE.match(argument) and not Path(argument).exists()]
    names = [argument for argument in arguments if argument not in overrides]
    if not names:
        raise ConfigError(
            "name what to evaluate: a run directory, RUN@VERSION, a model directory or a generations file"
        )
    runs = {argument: run for argument in names if (run := find_run(argument)) is not None}
    files = {argument for argument in names if argument not in runs and _is_file(argument)}
    models = [argument for argument in names if argument not in runs and argument not in files]
    config = None
    if config_file is not None:
        # A config must name a model. If only files are measured, the name is never used.
        config = load_config(config_file, [f"model.name={(models or names)[0]}", *overrides])
    elif runs:
        config = read_config(next(iter(runs.values()))[0], overrides)
    elif models:
        raise ConfigError(
            f"{models[0]} is not a run directory, so --config must name the task: "
            f"aft-ray evaluate {' '.join(names)} --config jobs/configs/gsm8k_smoke.yaml"
        )
    elif overrides:
        raise ConfigError(f"{overrides[0]} changes a value of a config, but there is no config; give one with --config")
    targets = []
    for argument in names:
        if argument in runs:
            run_dir, version = runs[argument]
            targets.append(_run_target(argument, run_dir, version, read_config(run_dir, overrides)))
        else:
            kind: Literal["model", "file"] = "file" if argument in files else "model"
            path = Path(argument)
            label = path.stem.removeprefix("generations-") if kind == "file" else path.name or path.resolve().name
            targets.append(Target(label, argument, kind, label, argument))
    return EvaluationPlan(_with_distinct_labels(targets), config)


def _is_file(argument: str) -> bool:
    path = Path(argument)
    if path.suffix in {".jsonl", ".parquet"}:
        if not path.exists():
            raise ConfigError(f"there is no file {argument}")
        return path.is_file()
    return path.is_dir() and not (path / "config.json").exists() and any(path.glob("*.parquet"))


def _run_target(argument: str, run_dir: RunDir, version: int | None, config: RunConfig) -> Target:
    published = find_version(run_dir, config, version)
    label = f"{run_dir.name}@{published.version}"
    return Target(label, published.model, "model", str(published.version), argument, config.model, run_dir)


def _with_distinct_labels(targets: Sequence[Target]) -> list[Target]:
    """The targets with distinct labels: if short names are equal, the whole arguments are used."""
    arguments = Counter(target.argument for target in targets)
    if max(arguments.values()) > 1:
        raise ConfigError(f"{arguments.most_common(1)[0][0]} is named twice; name each target once")
    labels = Counter(target.label for target in targets)
    return [replace(target, label=target.argument) if labels[target.label] > 1 else target for target in targets]
