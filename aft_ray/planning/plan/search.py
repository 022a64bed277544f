"""The fastest split of a cluster between engines and train workers, with the config's other settings as they are.

Invariant: none that fits is faster, by the arithmetic of a plan; of equally fast ones it takes the fewest GPUs. The
two sides of a round do not depend on each other, so each number of workers and each set of engines is timed once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import count

from aft_ray.cluster.connect import needs_samplers
from aft_ray.planning.plan import splits as placing
from aft_ray.planning.plan.planner import Planner, RoundTime
from aft_ray.planning.plan.problems import engine_fits, host_problem, trainer_fits
from aft_ray.planning.plan.splits import Split

TENSOR_PARALLEL = (1, 2, 4, 8, 16)


def best_split(planner: Planner) -> tuple[Split, RoundTime] | None:
    """None when nothing fits."""
    config = planner.config
    training = _training_seconds(planner)
    best: tuple[float, float, Split, RoundTime] | None = None
    for samplers, size in _engines(planner, len(training) - 1):
        least = samplers * size if config.sampling.colocate else 1
        most = _most_workers(planner, samplers, size, least, len(training) - 1)
        if most < least:
            continue
        workers = min(range(least, most + 1), key=training.__getitem__)
        # Without GPUs, engines and workers share host memory too: then fewer workers may do.
        while workers > least and host_problem(planner, Split(samplers, size, workers)):
            workers = min(range(least, workers), key=training.__getitem__)
        split = Split(samplers, size, workers)
        if math.isinf(training[workers]) or host_problem(planner, split):
            continue
        time = planner.meet(planner.sampling_side(split), training[workers])
        rank = (time.round, placing.gpus(config, split), split, time)
        if best is None or rank[:2] < best[:2]:
            best = rank
    return (best[2], best[3]) if best else None


def _engines(planner: Planner, most_workers: int) -> Iterator[tuple[int, int]]:
    """Engines that could be: (samplers, processes a stage)."""
    config, cluster = planner.config, planner.cluster
    if not needs_samplers(config):
        yield 0, 1
        return
    sizes = [config.sampling.tensor_parallel_size]
    if config.sampling.gpus_per_sampler >= 1:
        sizes = [size for size in sorted({*TENSOR_PARALLEL, *sizes}) if size <= cluster.node.gpus]
    for size in sizes:
        for samplers in count(1):
            workers = samplers * size if config.sampling.colocate else 1
            fitting = workers <= most_workers and placing.fits(config, Split(samplers, size, workers), cluster)
            if not fitting or not engine_fits(planner, size):
                break
            yield samplers, size


def _most_workers(planner: Planner, samplers: int, size: int, least: int, most: int) -> int:
    """The largest number of workers from `least` to `most` that fits beside so many engines, or `least` - 1."""
    low, high = least - 1, most
    while low < high:
        middle = (low + high + 1) // 2
        if placing.fits(planner.config, Split(samplers, size, middle), planner.cluster):
            low = middle
        else:
            high = middle - 1
    return low


def _training_seconds(planner: Planner) -> list[float]:
    """At index w, the seconds of a round with w workers; infinite where they cannot train it."""
    training, cluster = planner.config.training, planner.cluster
    most = cluster.gpus if training.gpus_per_worker else cluster.cpus
    seconds = [math.inf]
    for workers in range(1, min(most, training.groups_per_step) + 1):
        split = Split(0, 1, workers)
        possible = trainer_fits(planner, workers) and host_problem(planner, split) is None
        seconds.append(planner.training_side(split) if possible else math.inf)
    return seconds
