"""Resolves the model that a serving config names: a run directory, a version of it, a directory or a hub name.

Invariant: mistakes in the name of a model are found here, without Ray and before any process starts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from aft_ray.config.run import ConfigError, RunConfig, parse_config
from aft_ray.config.serve import ASKING_KEYS, ServeConfig
from aft_ray.storage.model_files import check_model
from aft_ray.storage.versions import find_run, find_version, read_config
from aft_ray.tasks.dataset import load_tokenizer
from aft_ray.tasks.response_end import response_ends
from aft_ray.weights.version_manifest import VersionManifest, read_version_manifest

# Most tokens of a prompt with its response, for a model that is not from a run and if the config does not set it.
_DEFAULT_MAX_LENGTH = 2048


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model that is served.

    Attributes:
        name: its name in the API.
        model: its directory, URI or hub name.
        run: the config of its task and prompts.
    """

    name: str
    model: str
    run: RunConfig


# The model, and the version manifest with its probes if the model is a version of a run.
Resolved = tuple[ServedModel, VersionManifest | None]


def resolve(config: ServeConfig) -> Resolved:
    """Returns the model that `config.model` names. Raises ConfigError, one sentence."""
    found = find_run(config.model)
    engine = config.engine
    if found is None:
        if config.follow:
            raise ConfigError(f"follow=true needs a run directory, and {config.model} is not one")
        if config.task is None:
            raise ConfigError(
                f"{config.model} is not a run directory, whose config would name its task; name the task, such as "
                f"task.task=gsm8k"
            )
        # An absolute path, since the engines' processes have other working directories.
        model = str(Path(config.model).resolve()) if Path(config.model).is_dir() else config.model
        asking = {key: getattr(config, key) for key in ASKING_KEYS}
        try:
            run = parse_config({"run_dir": ".", "model": {"name": model, **asking}, "data": config.task.model_dump()})
            run = _with_engine(run, model, engine.dtype or "bfloat16", engine.max_length or _DEFAULT_MAX_LENGTH)
            _check(run)
        except ConfigError as error:
            # In the config of a service these keys are not in the section `model`.
            raise ConfigError(re.sub(rf"\bmodel\.({'|'.join(ASKING_KEYS)})\b", r"\1", str(error))) from error
        return ServedModel(config.name or _last_part(model), model, run), None
    if config.task is not None:
        raise ConfigError(f"{config.model} is a run directory, whose config names its task; leave task out")
    if given := [key for key in ASKING_KEYS if key in config.model_fields_set]:
        raise ConfigError(
            f"{config.model} is a run directory, whose config says how its model is asked; leave {given[0]} out"
        )
    run_dir, version = found
    if config.follow and version is not None:
        raise ConfigError(f"follow=true serves the newest version; leave @{version} out, or leave follow out")
    run = read_config(run_dir)
    published = find_version(run_dir, run, version)
    run = _with_engine(run, published.model, engine.dtype or run.model.dtype, engine.max_length or run.model.max_length)
    _check(run)
    served = ServedModel(config.name or run_dir.name, published.model, run)
    return served, read_version_manifest(published.version, published.model)


def _check(run: RunConfig) -> None:
    """Raises ConfigError if the model cannot be loaded, or cannot be asked as the config says."""
    check_model(run)
    response_ends(run, load_tokenizer(run))


def _with_engine(run: RunConfig, model: str, dtype: str, max_length: int) -> RunConfig:
    """Returns the config of a run, which names the served model with the service's dtype and context."""
    # A service never runs code that comes with a model, even if the training run allowed it.
    update = {"name": model, "dtype": dtype, "max_length": max_length, "trust_remote_code": False}
    # Every process of the service, one that is started tomorrow too, tells the chat template the same day.
    return run.model_copy(update={"model": run.model.model_copy(update=update).dated(date.today())})


def _last_part(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2] or path
