"""The models that a run has published, as directories that can be loaded.

Invariant: only a version whose training the ledger records as done is ever named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import yaml

from aft_ray.config.loader import parse_section
from aft_ray.config.run import ConfigError, RunConfig
from aft_ray.storage.ledger import Ledger
from aft_ray.storage.run_dir import CONFIG, RunDir, local_model


@dataclass(frozen=True, slots=True)
class PublishedVersion:
    """A policy version and its model: a directory, a hub name, or a URI in a run directory on an object store."""

    version: int
    model: str


def find_run(argument: str) -> tuple[RunDir, int | None] | None:
    """The run directory that RUN or RUN@VERSION names, and which version of it; None when it names none."""
    place, at, version = argument.rpartition("@")
    if at and version.isdigit() and (run_dir := RunDir(place)).exists(CONFIG):
        return run_dir, int(version)
    run_dir = RunDir(argument)
    return (run_dir, None) if run_dir.exists(CONFIG) else None


def read_config(run_dir: RunDir, overrides: Sequence[str] = ()) -> RunConfig:
    """The resolved config of a run, with overrides. Raises ConfigError when there is no run there."""
    if not run_dir.exists(CONFIG):
        raise ConfigError(f"{run_dir.uri()} is not a run directory: it has no {CONFIG}")
    return parse_section(RunConfig, yaml.safe_load(run_dir.read_bytes(CONFIG)), overrides)


def find_version(
    run_dir: RunDir, config: RunConfig, version: int | None, trained: Sequence[int] | None = None
) -> PublishedVersion:
    """A version of the run; None: the last. Raises ConfigError when it has not published it.

    trained: the versions to choose from; None: all that the ledger knows.
    """
    trained = Ledger(run_dir).trained_rounds() if trained is None else trained
    if version is None:
        if not trained:
            raise ConfigError(f"{run_dir.uri()} has no trained round yet; wait for one, or name a model directory")
        version = trained[-1]
    if version == 0 and not config.vft.epochs:
        return PublishedVersion(version, config.model.name)
    if version not in trained:
        known = ", ".join(map(str, trained)) or "none"
        raise ConfigError(f"{run_dir.uri()} has no version {version}; it has published: {known}")
    model = run_dir.uri(run_dir.model(version))
    local_model(model)  # raises while somebody is there to read it
    return PublishedVersion(version, model)
