"""Which split of GPUs between engines and train workers fits a cluster, node by node, and what is left over.

Invariant: the processes of a tensor-parallel stage share a node; a train worker has a GPU of its own. Counts of
engines and workers are all that matters, since nodes are alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from aft_ray.cluster.connect import DATA_CPUS, needs_samplers
from aft_ray.cluster.placement import Bundle
from aft_ray.config.run import RunConfig
from aft_ray.planning.plan.hardware import ClusterShape, NodeType


@dataclass(frozen=True, slots=True)
class Split:
    """How many engines of how many processes a stage, and how many train workers."""

    samplers: int
    tensor_parallel: int
    workers: int


def split_of(config: RunConfig) -> Split:
    """What a config asks for."""
    samplers = config.sampling.samplers if needs_samplers(config) else 0
    return Split(samplers, config.sampling.tensor_parallel_size, config.training.workers)


def gpus(config: RunConfig, split: Split) -> float:
    """GPUs that a split takes: engines that take turns with the workers have none of their own."""
    each = 0.0
    if config.sampling.gpus_per_sampler:
        stages = config.sampling.pipeline_parallel_size
        each = min(config.sampling.gpus_per_sampler, 1) * split.tensor_parallel * stages
    engines, workers = split.samplers * each, split.workers * config.training.gpus_per_worker
    return max(engines, workers) if config.sampling.colocate else engines + workers


def sampler_nodes(config: RunConfig, split: Split, node: NodeType) -> int:
    """Nodes with an engine on them."""
    if not config.sampling.gpus_per_sampler or not split.samplers:
        return 1
    if config.sampling.colocate:
        return -(-split.samplers * split.tensor_parallel // max(1, node.gpus))
    in_a_node = max(1, stages_in_a_node(config, split, node))
    return max(1, -(-split.samplers * config.sampling.pipeline_parallel_size // in_a_node))


def stages_in_a_node(config: RunConfig, split: Split, node: NodeType) -> int:
    """Stages of engines that fit in a node; 0 when none does."""
    stage = _stage(config, split)
    if split.tensor_parallel > node.gpus and config.sampling.gpus_per_sampler:
        return 0
    by_gpu = round(node.gpus / stage.gpus, 6) if stage.gpus else math.inf
    return int(min(round(node.cpus / stage.cpus, 6), by_gpu))


def fits(config: RunConfig, split: Split, cluster: ClusterShape) -> bool:
    """Whether the cluster's nodes hold it: engines first, as they need several GPUs of one node, then workers.

    The same answer as `aft_ray.cluster.placement.place` gives, in a time that does not grow with the cluster.
    """
    node, sampling, training = cluster.node, config.sampling, config.training
    if sampling.colocate and split.samplers * split.tensor_parallel > split.workers:
        return False
    stages = split.samplers * sampling.pipeline_parallel_size
    per_node = stages_in_a_node(config, split, node)
    if stages > per_node * cluster.nodes:
        return False
    full, rest = divmod(stages, per_node) if per_node else (0, 0)
    kinds = [(per_node, full), (rest, 1 if rest else 0), (0, cluster.nodes - full - (1 if rest else 0))]
    stage = _stage(config, split)
    room, cpus_left = 0, 0.0
    for engines, nodes in kinds:
        free_gpus, free_cpus = node.gpus - engines * stage.gpus, node.cpus - engines * stage.cpus
        by_gpu = free_gpus // training.gpus_per_worker if training.gpus_per_worker else math.inf
        room += nodes * int(min(by_gpu, round(free_cpus / training.cpus_per_worker, 6)))
        cpus_left += nodes * free_cpus
    return split.workers <= room and cpus_left - split.workers * training.cpus_per_worker >= DATA_CPUS


def _stage(config: RunConfig, split: Split) -> Bundle:
    """What a stage of an engine reserves in its node; a colocated one has no GPUs of its own."""
    sampling = config.sampling
    gpus = min(sampling.gpus_per_sampler, 1) * split.tensor_parallel
    return Bundle(sampling.cpus_per_sampler / sampling.pipeline_parallel_size, 0 if sampling.colocate else gpus)


def nodes_needed(config: RunConfig, split: Split, node: NodeType, most: int = 4096) -> int | None:
    """The fewest nodes that hold a split; None when no number of them does."""
    if split.samplers and not stages_in_a_node(config, split, node):
        return None
    if config.training.gpus_per_worker and not node.gpus:
        return None
    low, high = 1, 1
    while not fits(config, split, ClusterShape(node, high)):
        low, high = high + 1, 2 * high
        if high > 2 * most:
            return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(config, split, ClusterShape(node, middle)) else (middle + 1, high)
    return low


def cpus(config: RunConfig, split: Split) -> int:
    """CPUs that a split takes, those of Ray Data included."""
    needed = split.samplers * config.sampling.cpus_per_sampler + split.workers * config.training.cpus_per_worker
    return math.ceil(needed) + DATA_CPUS
