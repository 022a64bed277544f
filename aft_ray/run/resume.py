"""What a run that is started again takes over from its run directory: its config and its published versions.

Invariant: a run is resumed only with a config that leads to the same steps, up to rounding.
"""

from __future__ import annotations

from datetime import date

from aft_ray.config.loader import config_difference, dump_config
from aft_ray.config.run import ConfigError, RunConfig
from aft_ray.storage.run_dir import CONFIG, RunDir
from aft_ray.storage.versions import read_config
from aft_ray.weights.version_manifest import VersionManifest, given_manifest, stored_manifest

# Keys that a resumed run may change: they move the same steps to other hardware.
_HARDWARE_KEYS = frozenset(
    f"training.{key}"
    for key in (
        "workers",
        "cpus_per_worker",
        "gpus_per_worker",
        "tokens_per_microbatch",
        "offload_optimizer",
        "offload_parameters",
        "activation_checkpointing",
        "checkpoint_every_s",
        "compile",
    )
)


def adopt_config(config: RunConfig, run_dir: RunDir) -> tuple[RunConfig, list[str]]:
    """Writes the resolved config into a new run directory, or compares it with the one of a run that was begun.

    The cluster, the run directory's own address and the hardware of training may differ. Without `model.template_date`
    a run has the day on which it began, so that it asks its questions in the same way when it is resumed later.

    Returns:
        The config with a template date, and a line `key: old -> new` for each difference in the hardware of training.

    Raises:
        ConfigError: the configs differ in anything else.
    """
    if not run_dir.exists(CONFIG):
        config = _dated(config, date.today())
        run_dir.write_bytes(CONFIG, dump_config(config).encode())
        return config, []
    stored = read_config(run_dir)
    config = _dated(config, stored.model.template_date or date.today())
    began = _dated(stored, config.model.template_date or date.today())
    difference = config_difference(began, config)
    difference = [line for line in difference if not line.startswith(("cluster.", "run_dir:"))]
    changed = [line for line in difference if line.partition(":")[0] in _HARDWARE_KEYS]
    if refused := [line for line in difference if line not in changed]:
        raise ConfigError(
            f"{run_dir.uri()} was started with another config ({'; '.join(refused)}); give the run the config it "
            f"was started with, or another run_dir"
        )
    if config.training.optimizer != "adamw" and began.training.workers != config.training.workers:
        raise ConfigError(
            f"training.workers: {began.training.workers} -> {config.training.workers} is not possible with "
            f"training.optimizer={config.training.optimizer}, whose 8-bit states belong to the shards of so many "
            f"workers; resume with training.workers={began.training.workers}"
        )
    if began != stored:  # an earlier release began the run, and did not write the date down
        run_dir.write_bytes(CONFIG, dump_config(began).encode())
    return config, changed


def _dated(config: RunConfig, day: date) -> RunConfig:
    """The same config with `day` as the template date, unless it has one."""
    return config.model_copy(update={"model": config.model.dated(day)})


def version_on_disk(config: RunConfig, run_dir: RunDir, version: int) -> VersionManifest:
    """The manifest of a version as the run directory has it; version 0 of a run without round 0 is the given model."""
    if version == 0 and not config.vft.epochs:
        return given_manifest(config)
    return stored_manifest(config, run_dir, version)
