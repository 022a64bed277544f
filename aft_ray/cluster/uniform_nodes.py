"""Whether a cluster of nodes that are all alike holds a split, in closed form. Pure arithmetic, without Ray.

`aft-ray plan` searches over many splits and cluster sizes, so the cost of a check must not grow with the cluster.

Invariant: `fits` gives the same answer as `aft_ray.cluster.placement.place` on as many nodes. A `node` is here what
each of the nodes has.
"""

from __future__ import annotations

import math

from aft_ray.cluster.placement import Bundle
from aft_ray.cluster.reservations import DATA_CPUS, Split, sampler_bundles, worker_bundle
from aft_ray.config.run import RunConfig


def fits(config: RunConfig, split: Split, node: Bundle, nodes: int) -> bool:
    """Whether `nodes` nodes hold a split: samplers are placed first, as they need several GPUs of one node."""
    if config.sampling.colocate and split.samplers * split.tensor_parallel > split.workers:
        return False
    stage, worker = _stage(config, split), worker_bundle(config.training)
    stages = _stages(config, split)
    per_node = stages_per_node(config, split, node)
    if stages > per_node * nodes:
        return False
    full, rest = divmod(stages, per_node) if per_node else (0, 0)
    # Pairs: stages on a node, and the number of nodes that hold so many.
    loads = [(per_node, full), (rest, 1 if rest else 0), (0, nodes - full - (1 if rest else 0))]
    workers_that_fit, cpus_left = 0, 0.0
    for stages_here, count in loads:
        free = Bundle(node.cpus - stages_here * stage.cpus, node.gpus - stages_here * stage.gpus)
        by_gpu = free.gpus // worker.gpus if worker.gpus else math.inf
        workers_that_fit += count * int(min(by_gpu, round(free.cpus / worker.cpus, 6)))
        cpus_left += count * free.cpus
    return split.workers <= workers_that_fit and cpus_left - split.workers * worker.cpus >= DATA_CPUS


def nodes_needed(config: RunConfig, split: Split, node: Bundle, most: int = 4096) -> int | None:
    """The fewest nodes that hold a split; None when no number of nodes does."""
    if split.samplers and not stages_per_node(config, split, node):
        return None
    if config.training.gpus_per_worker and not node.gpus:
        return None
    low, high = 1, 1
    while not fits(config, split, node, high):
        low, high = high + 1, 2 * high
        if high > 2 * most:
            return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(config, split, node, middle) else (middle + 1, high)
    return low


def sampler_nodes(config: RunConfig, split: Split, node: Bundle) -> int:
    """The number of nodes that hold a sampler; 1 for samplers without GPUs."""
    if not config.sampling.gpus_per_sampler or not split.samplers:
        return 1
    if config.sampling.colocate:
        return math.ceil(split.samplers * split.tensor_parallel / max(1, node.gpus))
    return max(1, math.ceil(_stages(config, split) / max(1, stages_per_node(config, split, node))))


def stages_per_node(config: RunConfig, split: Split, node: Bundle) -> int:
    """The number of engine stages that fit on an empty node; 0 when none fits."""
    stage = _stage(config, split)
    if split.tensor_parallel > node.gpus and config.sampling.gpus_per_sampler:
        return 0
    by_gpu = round(node.gpus / stage.gpus, 6) if stage.gpus else math.inf
    return int(min(round(node.cpus / stage.cpus, 6), by_gpu))


def _stages(config: RunConfig, split: Split) -> int:
    """The number of engine stages of all samplers that are placed one by one."""
    return split.samplers * len(sampler_bundles(config.sampling, split.tensor_parallel))


def _stage(config: RunConfig, split: Split) -> Bundle:
    """What one stage of an engine reserves in its node."""
    return sampler_bundles(config.sampling, split.tensor_parallel)[0]
