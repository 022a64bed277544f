"""The Ray cluster of a run: found or started here, checked against what the run needs before any actor starts."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

from aft_ray.config import ClusterConfig, ConfigError, RunConfig
from aft_ray.serve_config import ServeConfig

# For Ray Data's own tasks (labelling, writing) and the forwarding actor, beside samplers and train workers.
DATA_CPUS = 2


@dataclass(frozen=True, slots=True)
class Placement:
    """What a run reserves: `cpus` and `gpus` are totals over samplers, train workers and Ray Data."""

    samplers: int
    cpus_per_sampler: float
    gpus_per_sampler: float
    workers: int
    cpus_per_worker: float
    gpus_per_worker: float

    @property
    def cpus(self) -> int:
        return math.ceil(self.samplers * self.cpus_per_sampler + self.workers * self.cpus_per_worker) + DATA_CPUS

    @property
    def gpus(self) -> float:
        return self.samplers * self.gpus_per_sampler + self.workers * self.gpus_per_worker

    advice = "Lower sampling.samplers or training.workers, or add nodes"

    def lines(self) -> list[str]:
        """The arithmetic, a line each part."""
        return [
            f"samplers       {self.samplers} x {self.cpus_per_sampler:g} CPU, {self.gpus_per_sampler:g} GPU",
            f"train workers  {self.workers} x {self.cpus_per_worker:g} CPU, {self.gpus_per_worker:g} GPU",
            f"Ray Data       {DATA_CPUS} CPU",
            f"in all         {self.cpus} CPU, {self.gpus:g} GPU",
        ]


def training_placement(config: RunConfig) -> Placement:
    """What `aft-ray train` reserves. Samplers are left out when nothing is sampled or evaluated."""
    return _placement(config, config.sampling.samplers if needs_samplers(config) else 0, config.training.workers)


def evaluation_placement(config: RunConfig) -> Placement:
    """What `aft-ray evaluate` reserves."""
    return _placement(config, config.sampling.samplers, 0)


def needs_samplers(config: RunConfig) -> bool:
    return (config.samples and config.rounds.count > 0) or config.rounds.evaluate_every > 0


def _placement(config: RunConfig, samplers: int, workers: int) -> Placement:
    sampling, training = config.sampling, config.training
    return Placement(
        samplers,
        sampling.cpus_per_sampler,
        sampling.gpus_per_sampler,
        workers,
        training.cpus_per_worker,
        training.gpus_per_worker,
    )


@dataclass(frozen=True, slots=True)
class ServingPlacement:
    """What a served reasoner reserves when it starts; engines that autoscaling adds come on top."""

    engines: int
    processes_per_engine: int
    cpus_per_process: float
    gpus_per_process: float
    reasoners: int
    cpus_per_reasoner: float

    @property
    def cpus(self) -> int:
        engines = self.engines * self.processes_per_engine * self.cpus_per_process
        return math.ceil(engines + self.reasoners * self.cpus_per_reasoner)

    @property
    def gpus(self) -> float:
        return self.engines * self.processes_per_engine * self.gpus_per_process

    advice = "Lower engine.replicas or reasoner.replicas, or add nodes"

    def lines(self) -> list[str]:
        """The arithmetic, a line each part."""
        return [
            f"engines        {self.engines} x {self.processes_per_engine} x {self.cpus_per_process:g} CPU, "
            f"{self.gpus_per_process:g} GPU",
            f"reasoners      {self.reasoners} x {self.cpus_per_reasoner:g} CPU",
            f"in all         {self.cpus} CPU, {self.gpus:g} GPU",
        ]


def serving_placement(config: ServeConfig) -> ServingPlacement:
    """What `aft-ray serve` reserves."""
    engine, reasoner = config.engine, config.reasoner
    processes = engine.tensor_parallel_size * engine.pipeline_parallel_size
    return ServingPlacement(engine.replicas, processes, engine.cpus, engine.gpus, reasoner.replicas, reasoner.cpus)


@contextlib.contextmanager
def connected(cluster: ClusterConfig, placement: Placement | ServingPlacement) -> Iterator[None]:
    """Connects to `cluster.address`, RAY_ADDRESS or a Ray started here, and leaves it at the end.

    Raises ConfigError with the arithmetic when the cluster cannot hold the run.
    """
    # Ours are the lines on the terminal; Ray's go to its session directory and to the run's logs.
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        _check(placement)
        yield
        return
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            ray.init(
                address="local",
                num_cpus=max(cluster.logical_cpus or placement.cpus, placement.cpus),
                object_store_memory=cluster.object_store_mib << 20,
                include_dashboard=False,
                **quiet,
            )
    except ConnectionError as error:
        raise ConfigError(
            f"no Ray cluster answers at {address}; start one with `ray start --head`, or leave cluster.address and "
            f"RAY_ADDRESS unset to have one started here"
        ) from error
    try:
        _check(placement)
        yield
    finally:
        ray.shutdown()


def _check(placement: Placement | ServingPlacement) -> None:
    """Compares the run's needs with the cluster's total, and with what it could scale up to is left to the scaler."""
    import ray

    have = ray.cluster_resources()
    for kind, need in (("CPU", placement.cpus), ("GPU", placement.gpus)):
        if need > have.get(kind, 0):
            raise ConfigError(
                f"{need:g} {kind}s are needed and the cluster has {have.get(kind, 0):g}: "
                + "; ".join(" ".join(line.split()) for line in placement.lines())
                + f". {placement.advice}"
            )
