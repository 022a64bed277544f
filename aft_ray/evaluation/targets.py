"""What the arguments of `aft-ray evaluate` mean: runs, models, files of answers, and the config they are measured with.

Invariant: all that can be wrong with an argument is found here, before any engine starts; and whatever is compared is
asked the same questions, those of one config.
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
    """One thing to measure.

    source: a model directory or hub name, or for kind "file" the path of the file (or directory) of answers.
    label: its column in tables.
    name: its part in names of files.
    argument: how it was named on the command line.
    model: of a run, how its model is to be loaded and asked; None: as the common config says.
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
    """All targets in their order, and the config that they share; None when there are only files and no config."""

    targets: list[Target]
    config: RunConfig | None


def plan_evaluation(arguments: Sequence[str], config_file: Path | None) -> EvaluationPlan:
    """Reads the command line: targets and `key.sub=value` overrides. Raises ConfigError, one sentence."""
    overrides = [argument for argument in arguments if _OVERRIDE.match(argument) and not Path(argument).exists()]
    named = [argument for argument in arguments if argument not in overrides]
    if not named:
        raise ConfigError(
            "name what to evaluate: a run directory, RUN@VERSION, a model directory or a generations file"
        )
    runs = {argument: run for argument in named if (run := find_run(argument)) is not None}
    files = {argument for argument in named if argument not in runs and _is_file(argument)}
    models = [argument for argument in named if argument not in runs and argument not in files]
    config = None
    if config_file is not None:
        # A config needs a model and answers on file need none, so that any name will do for them.
        config = load_config(config_file, [f"model.name={(models or named)[0]}", *overrides])
    elif runs:
        config = read_config(next(iter(runs.values()))[0], overrides)
    elif models:
        raise ConfigError(
            f"{models[0]} is not a run directory, so --config must name the task: "
            f"aft-ray evaluate {' '.join(named)} --config jobs/configs/gsm8k_smoke.yaml"
        )
    elif overrides:
        raise ConfigError(f"{overrides[0]} changes a config, and there is none: give one with --config")
    targets = []
    for argument in named:
        if argument in runs:
            run_dir, version = runs[argument]
            targets.append(_of_run(argument, run_dir, version, read_config(run_dir, overrides)))
        else:
            kind: Literal["model", "file"] = "file" if argument in files else "model"
            path = Path(argument)
            label = path.stem.removeprefix("generations-") if kind == "file" else path.name or path.resolve().name
            targets.append(Target(label, argument, kind, label, argument))
    return EvaluationPlan(_distinct(targets), config)


def _is_file(argument: str) -> bool:
    path = Path(argument)
    if path.suffix in {".jsonl", ".parquet"}:
        if not path.exists():
            raise ConfigError(f"there is no file {argument}")
        return path.is_file()
    return path.is_dir() and not (path / "config.json").exists() and any(path.glob("*.parquet"))


def _of_run(argument: str, run_dir: RunDir, version: int | None, config: RunConfig) -> Target:
    published = find_version(run_dir, config, version)
    label = f"{run_dir.name}@{published.version}"
    return Target(label, published.model, "model", str(published.version), argument, config.model, run_dir)


def _distinct(targets: Sequence[Target]) -> list[Target]:
    """Targets with labels that differ: an argument in full where the short names are the same."""
    arguments = Counter(target.argument for target in targets)
    if max(arguments.values()) > 1:
        raise ConfigError(f"{arguments.most_common(1)[0][0]} is named twice; name each target once")
    labels = Counter(target.label for target in targets)
    return [replace(target, label=target.argument) if labels[target.label] > 1 else target for target in targets]
