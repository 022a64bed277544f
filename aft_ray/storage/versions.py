"""Finds runs, their configs, and the versions that they have published.

Invariant: a version is returned only if the ledger records that its round is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aft_ray.config.loader import parse_section, parse_yaml
from aft_ray.config.run import ConfigError, RunConfig
from aft_ray.storage.ledger import Ledger
from aft_ray.storage.run_dir import CONFIG, RunDir, local_model


@dataclass(frozen=True, slots=True)
class PublishedVersion:
    """A policy version and its model.

    Attributes:
        model: a local directory, a hub name, or a URI in a run directory on an object store.
    """

    version: int
    model: str


def find_run(argument: str) -> tuple[RunDir, int | None] | None:
    """The run directory and the version that RUN or RUN@VERSION names; None when there is no run directory there."""
    directory, at, version = argument.rpartition("@")
    if at and version.isdigit() and (run_dir := RunDir(directory)).exists(CONFIG):
        return run_dir, int(version)
    run_dir = RunDir(argument)
    return (run_dir, None) if run_dir.exists(CONFIG) else None


def read_config(run_dir: RunDir, overrides: Sequence[str] = ()) -> RunConfig:
    """The resolved config of a run with `key.sub=value` overrides.

    Raises:
        ConfigError: There is no config in the directory, or it is damaged, or an override is wrong.
    """
    if not run_dir.exists(CONFIG):
        raise ConfigError(f"{run_dir.uri()} is not a run directory: it has no {CONFIG}")
    tree = parse_yaml(run_dir.read_bytes(CONFIG), run_dir.uri(CONFIG))
    return parse_section(RunConfig, tree, overrides)


def find_version(
    run_dir: RunDir, config: RunConfig, version: int | None, trained: Sequence[int] | None = None
) -> PublishedVersion:
    """A version that the run has published.

    Args:
        version: The number of the version; None for the latest.
        trained: The versions to choose from; None for all that the ledger records.

    Raises:
        ConfigError: The run has not published the version.
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
    local_model(model)  # downloads it now, so that an error is raised here and not in an actor
    return PublishedVersion(version, model)
