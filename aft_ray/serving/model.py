"""What is served: the model that a config names, and how it is asked.

Invariant: all that can be wrong with the name of a model is found here, without Ray and before anything starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from aft_ray.config.run import ConfigError, RunConfig, parse_config
from aft_ray.config.serve import ServeConfig
from aft_ray.run.preflight import check_model
from aft_ray.storage.versions import find_run, find_version, read_config
from aft_ray.weights.version_manifest import VersionManifest, read_version_manifest

# Context of a model that is of no run, when the config does not say: tokens.
_MAX_LENGTH = 2048


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What is served: its name to clients, its directory, URI or hub name, and the config it is asked with."""

    name: str
    model: str
    run: RunConfig


# What a config names; of a run's version also the publication, which has its proof.
Resolved = tuple[ServedModel, VersionManifest | None]


def resolve(config: ServeConfig) -> Resolved:
    """What `model` names, with the config it is asked by; a run's version also as a publication with its proof."""
    found = find_run(config.model)
    engine = config.engine
    if found is None:
        if config.follow:
            raise ConfigError(f"follow=true needs a run directory, and {config.model} is none")
        if config.task is None:
            raise ConfigError(
                f"{config.model} is not a run directory, which would know its task; name the task, such as "
                f"task.task=gsm8k"
            )
        # Engines are started in directories of their own.
        model = str(Path(config.model).resolve()) if Path(config.model).is_dir() else config.model
        run = parse_config({"run_dir": ".", "model": {"name": model}, "data": config.task.model_dump()})
        run = _with_engine(run, model, engine.dtype or "bfloat16", engine.max_length or _MAX_LENGTH)
        check_model(run)
        return ServedModel(config.name or _last_part(model), model, run), None
    if config.task is not None:
        raise ConfigError(f"{config.model} is a run, which knows its task; leave task out")
    run_dir, version = found
    if config.follow and version is not None:
        raise ConfigError(f"follow=true serves the newest version; leave @{version} out, or follow")
    run = read_config(run_dir)
    published = find_version(run_dir, run, version)
    run = _with_engine(run, published.model, engine.dtype or run.model.dtype, engine.max_length or run.model.max_length)
    check_model(run)
    served = ServedModel(config.name or run_dir.name, published.model, run)
    return served, read_version_manifest(published.version, published.model)


def _with_engine(run: RunConfig, model: str, dtype: str, max_length: int) -> RunConfig:
    # No code that comes with a model is run in a service, whatever its training allowed.
    update = {"name": model, "dtype": dtype, "max_length": max_length, "trust_remote_code": False}
    return run.model_copy(update={"model": run.model.model_copy(update=update)})


def _last_part(place: str) -> str:
    return place.rstrip("/").rpartition("/")[2] or place
