"""What a training run, an evaluation and a service reserve of a Ray cluster. Pure arithmetic, without Ray.

Invariant: the check before a start, the samplers' placement groups and `aft-ray plan` all read from here what an engine
and a train worker reserve, so they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from aft_ray.cluster.placement import Bundle, Reservation, Reservations, amount
from aft_ray.config.run import RunConfig, SamplingConfig, TrainingConfig
from aft_ray.config.serve import ServeConfig

# CPUs for Ray Data's own tasks (labelling, writing) and its forwarding actor, beside samplers and train workers.
DATA_CPUS = 2


@dataclass(frozen=True, slots=True)
class Split:
    """How a run divides a cluster: the number of samplers, the processes in each stage of a sampler's engine, and the
    number of train workers."""

    samplers: int
    tensor_parallel: int
    workers: int


def split_of(config: RunConfig) -> Split:
    """The split that a config asks for. There are no samplers when nothing is sampled or evaluated."""
    samplers = config.sampling.samplers if config.needs_samplers else 0
    return Split(samplers, config.sampling.tensor_parallel_size, config.training.workers)


def sampler_bundles(sampling: SamplingConfig, tensor_parallel: int | None = None) -> tuple[Bundle, ...]:
    """What one sampler reserves: one bundle for each stage of its engine that may lie on a node of its own.

    Args:
        sampling: The sampling section of a config. With `colocate` samplers reserve no GPUs.
        tensor_parallel: Processes in a stage; None means those of the config.
    """
    bundles, processes = 1, sampling.pipeline_parallel_size
    if sampling.spans_nodes:
        bundles, processes = sampling.pipeline_parallel_size, 1
    processes *= tensor_parallel or sampling.tensor_parallel_size
    gpus = 0 if sampling.colocate else min(sampling.gpus_per_sampler, 1) * processes
    return (Bundle(sampling.cpus_per_sampler / bundles, gpus),) * bundles


def worker_bundle(training: TrainingConfig) -> Bundle:
    """What one train worker reserves."""
    return Bundle(training.cpus_per_worker, training.gpus_per_worker)


def placement_group_bundles(sampling: SamplingConfig) -> list[dict[str, float]]:
    """The bundles of a sampler's Ray placement group. Ray keeps each bundle in one node.

    An engine that spans nodes has one bundle for each GPU, because vLLM's Ray executor takes bundles of one GPU.
    """
    bundles = sampler_bundles(sampling)
    if sampling.spans_nodes:
        processes = sampling.processes_per_sampler
        bundles = (Bundle(sampling.cpus_per_sampler / processes, 1),) * processes
    return [
        {kind: value for kind, value in (("CPU", bundle.cpus), ("GPU", bundle.gpus)) if value} for bundle in bundles
    ]


def stages_are_whole(processes_on_nodes: Iterable[int], tensor_parallel_size: int) -> bool:
    """Whether every node holds whole stages of an engine. vLLM numbers the engine's processes node by node.

    Args:
        processes_on_nodes: The number of the engine's processes on each node.
        tensor_parallel_size: Processes in a stage.
    """
    return all(count % tensor_parallel_size == 0 for count in processes_on_nodes)


def training_reservations(config: RunConfig, split: Split | None = None) -> Reservations:
    """What `aft-ray train` reserves.

    Args:
        config: The run.
        split: The numbers of samplers and train workers; None means those of the config.
    """
    return _run_reservations(config, split or split_of(config))


def evaluation_reservations(config: RunConfig) -> Reservations:
    """What `aft-ray evaluate` reserves. Samplers have GPUs of their own, because there are no train workers."""
    separate = config.sampling.model_copy(update={"colocate": False})
    split = Split(separate.samplers, separate.tensor_parallel_size, 0)
    return _run_reservations(config.model_copy(update={"sampling": separate}), split)


def _run_reservations(config: RunConfig, split: Split) -> Reservations:
    sampling = config.sampling
    stages = f"{sampling.pipeline_parallel_size} stages of " if sampling.pipeline_parallel_size > 1 else ""
    note = f"{stages}{split.tensor_parallel} in one node" if sampling.processes_per_sampler > 1 else ""
    if sampling.colocate:
        note = f"on the train workers' GPUs in turn, {amount(sampling.gpus_per_sampler, 'GPU')} each"
    return Reservations(
        (
            Reservation(
                "sampler",
                split.samplers,
                sampler_bundles(sampling, split.tensor_parallel),
                "sampling.tensor_parallel_size or sampling.cpus_per_sampler",
                note,
            ),
            Reservation(
                "train worker",
                split.workers,
                (worker_bundle(config.training),),
                "training.cpus_per_worker",
            ),
            Reservation("Ray Data task", DATA_CPUS, (Bundle(1),)),
        ),
        "Lower sampling.samplers or training.workers, or add nodes",
    )


def serving_reservations(config: ServeConfig) -> Reservations:
    """What `aft-ray serve` reserves at its start. Engines that autoscaling adds later are not counted."""
    engine, reasoner = config.engine, config.reasoner
    processes = engine.tensor_parallel_size * engine.pipeline_parallel_size
    in_a_bundle = processes if engine.pipeline_parallel_size == 1 else 1
    return Reservations(
        (
            Reservation(
                "engine",
                engine.replicas,
                (Bundle(engine.cpus * in_a_bundle, engine.gpus * in_a_bundle),) * (processes // in_a_bundle),
                "engine.tensor_parallel_size or engine.cpus",
            ),
            Reservation("reasoner", reasoner.replicas, (Bundle(reasoner.cpus),), "reasoner.cpus"),
        ),
        "Lower engine.replicas or reasoner.replicas, or add nodes",
    )
