"""Searches the fastest split of a cluster between samplers and train workers, with the config's other settings kept.

Invariant: no split that fits is faster, by the arithmetic of a plan; of equally fast splits it reserves the fewest
GPUs. The two sides of a round do not depend on each other, so the time of each number of workers and of each set of
samplers is computed once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import count

from aft_ray.cluster.reservations import Split
from aft_ray.planning.plan.planner import Planner, RoundTime
from aft_ray.planning.plan.problems import engine_fits, host_problem, trainer_fits

TENSOR_PARALLEL = (1, 2, 4, 8, 16)


def best_split(planner: Planner) -> tuple[Split, RoundTime] | None:
    """The fastest split and the time of its round; None when no split fits."""
    colocate = planner.config.sampling.colocate
    training = _training_seconds(planner)
    best: tuple[float, float, Split, RoundTime] | None = None
    for samplers, size in _sampler_sets(planner, len(training) - 1):
        least = samplers * size if colocate else 1
        most = _most_workers(planner, samplers, size, least, len(training) - 1)
        if most < least:
            continue
        workers = min(range(least, most + 1), key=training.__getitem__)
        # Without GPUs samplers and workers share host memory too: then fewer workers may fit.
        while workers > least and host_problem(planner, Split(samplers, size, workers)):
            workers = min(range(least, workers), key=training.__getitem__)
        split = Split(samplers, size, workers)
        if math.isinf(training[workers]) or host_problem(planner, split):
            continue
        time = planner.combine(planner.sampling_seconds(split), training[workers])
        candidate = (time.round, planner.reservations(split).gpus, split, time)
        if best is None or candidate[:2] < best[:2]:
            best = candidate
    return (best[2], best[3]) if best else None


def _sampler_sets(planner: Planner, most_workers: int) -> Iterator[tuple[int, int]]:
    """Pairs that fit: the number of samplers, and the processes in a stage of their engines."""
    config, cluster = planner.config, planner.cluster
    if not config.needs_samplers:
        yield 0, 1
        return
    sizes = [config.sampling.tensor_parallel_size]
    if config.sampling.gpus_per_sampler >= 1:
        sizes = [size for size in sorted({*TENSOR_PARALLEL, *sizes}) if size <= cluster.node.gpus]
    for size in sizes:
        for samplers in count(1):
            workers = samplers * size if config.sampling.colocate else 1
            fitting = workers <= most_workers and planner.fits(Split(samplers, size, workers))
            if not fitting or not engine_fits(planner, size):
                break
            yield samplers, size


def _most_workers(planner: Planner, samplers: int, size: int, least: int, most: int) -> int:
    """The largest number of workers from `least` to `most` that fits beside the samplers, or `least` - 1."""
    low, high = least - 1, most
    while low < high:
        middle = (low + high + 1) // 2
        if planner.fits(Split(samplers, size, middle)):
            low = middle
        else:
            high = middle - 1
    return low


def _training_seconds(planner: Planner) -> list[float]:
    """At index w the seconds of training on a round with w workers; infinite where they cannot train the model."""
    training, cluster = planner.config.training, planner.cluster
    most = cluster.gpus if training.gpus_per_worker else cluster.cpus
    seconds = [math.inf]
    for workers in range(1, min(most, training.groups_per_step) + 1):
        split = Split(0, 1, workers)
        possible = trainer_fits(planner, workers) and host_problem(planner, split) is None
        seconds.append(planner.training_seconds(split) if possible else math.inf)
    return seconds
