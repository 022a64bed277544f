"""Which split of GPUs between engines and train workers fits a cluster, node by node, and what is left over.

Invariant: the processes of a tensor-parallel stage share a node; a train worker has a GPU of its own. Counts of
engines and workers are all that matters, since nodes are alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from aft_ray.cluster import DATA_CPUS, needs_samplers
from aft_ray.config import RunConfig
from aft_ray.planning.hardware import Cluster, Node


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


def sampler_nodes(config: RunConfig, split: Split, node: Node) -> int:
    """Nodes with an engine on them."""
    if not config.sampling.gpus_per_sampler or not split.samplers:
        return 1
    in_a_node = max(1, stages_in_a_node(config, split, node))
    return max(1, -(-split.samplers * config.sampling.pipeline_parallel_size // in_a_node))


def stages_in_a_node(config: RunConfig, split: Split, node: Node) -> int:
    """Stages of engines that fit in a node; 0 when none does."""
    sampling = config.sampling
    by_cpu = math.inf
    if sampling.cpus_per_sampler:
        by_cpu = node.cpus // (sampling.cpus_per_sampler / sampling.pipeline_parallel_size)
    by_gpu = math.inf
    if sampling.gpus_per_sampler:
        by_gpu = node.gpus // (min(sampling.gpus_per_sampler, 1) * split.tensor_parallel)
    return int(min(by_cpu, by_gpu))


def fits(config: RunConfig, split: Split, cluster: Cluster) -> bool:
    """Whether the cluster's nodes hold it: engines first, as they need several GPUs of one node, then workers."""
    node, sampling, training = cluster.node, config.sampling, config.training
    stages = split.samplers * sampling.pipeline_parallel_size
    per_node = stages_in_a_node(config, split, node)
    if stages > per_node * cluster.nodes:
        return False
    if cpus(config, split) > cluster.cpus:
        return False
    if gpus(config, split) > cluster.gpus:
        return False
    if sampling.colocate or not training.gpus_per_worker:
        return True
    # A GPU that a fraction of an engine holds is no whole one.
    share = min(sampling.gpus_per_sampler, 1)
    stage_gpus = share * split.tensor_parallel
    full, rest = divmod(stages, per_node) if per_node else (0, 0)
    free = (cluster.nodes - full - (1 if rest else 0)) * node.gpus
    free += full * (node.gpus - math.ceil(per_node * stage_gpus))
    free += (node.gpus - math.ceil(rest * stage_gpus)) if rest else 0
    return split.workers <= free


def nodes_needed(config: RunConfig, split: Split, node: Node, most: int = 4096) -> int | None:
    """The fewest nodes that hold a split; None when no number of them does."""
    if split.samplers and not stages_in_a_node(config, split, node):
        return None
    if config.training.gpus_per_worker and not node.gpus:
        return None
    low, high = 1, 1
    while not fits(config, split, Cluster(node, high)):
        low, high = high + 1, 2 * high
        if high > 2 * most:
            return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(config, split, Cluster(node, middle)) else (middle + 1, high)
    return low


def cpus(config: RunConfig, split: Split) -> int:
    """CPUs that a split takes, those of Ray Data included."""
    sampling, training = config.sampling, config.training
    needed = split.samplers * sampling.cpus_per_sampler + split.workers * training.cpus_per_worker
    return math.ceil(needed) + DATA_CPUS
