"""The fastest split of a cluster between engines and train workers, with the config's other settings as they are.

Invariant: none that fits is faster, by the arithmetic of a plan; of equally fast ones it takes the fewest GPUs. The
two sides of a round do not depend on each other, so each number of workers and each set of engines is timed once.
"""

from __future__ import annotations

from collections.abc import Iterator

from aft_ray.cluster import needs_samplers
from aft_ray.planning import placing
from aft_ray.planning.placing import Split
from aft_ray.planning.planner import Planner, RoundTime
from aft_ray.planning.problems import engine_fits, host_problem, trainer_fits

TENSOR_PARALLEL = (1, 2, 4, 8, 16)


def best_split(planner: Planner) -> tuple[Split, RoundTime] | None:
    """None when nothing fits."""
    fastest = _training_by_workers(planner)
    best: tuple[float, float, Split, RoundTime] | None = None
    for samplers, size in _engines(planner):
        quickest = fastest[_most_workers(planner, samplers, size, len(fastest) - 1)]
        # Without GPUs, engines and workers share host memory too: then fewer workers may do.
        while quickest is not None and host_problem(planner, Split(samplers, size, quickest[0])):
            quickest = fastest[quickest[0] - 1]
        if quickest is None:
            continue
        workers, training = quickest
        split = Split(samplers, size, workers)
        time = planner.meet(planner.sampling_side(split), training)
        rank = (time.round, placing.gpus(planner.config, split), split, time)
        if best is None or rank[:2] < best[:2]:
            best = rank
    return (best[2], best[3]) if best else None


def _engines(planner: Planner) -> Iterator[tuple[int, int]]:
    """Engines that could be: (samplers, processes a stage)."""
    config, cluster = planner.config, planner.cluster
    if not needs_samplers(config):
        yield 0, 1
        return
    sizes = [config.sampling.tensor_parallel_size]
    if config.sampling.gpus_per_sampler >= 1:
        sizes = [size for size in TENSOR_PARALLEL if size <= cluster.node.gpus]
    for size in sizes:
        samplers = 1
        while engine_fits(planner, size) and placing.fits(config, Split(samplers, size, 1), cluster):
            yield samplers, size
            samplers += 1


def _most_workers(planner: Planner, samplers: int, size: int, most: int) -> int:
    """The largest number of workers that fits beside so many engines."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if placing.fits(planner.config, Split(samplers, size, middle), planner.cluster):
            low = middle
        else:
            high = middle - 1
    return low


def _training_by_workers(planner: Planner) -> list[tuple[int, float] | None]:
    """At index w, the fastest number of at most w workers that can train it, and its seconds."""
    training, cluster = planner.config.training, planner.cluster
    most = cluster.gpus if training.gpus_per_worker else cluster.cpus
    best: tuple[int, float] | None = None
    found: list[tuple[int, float] | None] = [None]
    for workers in range(1, min(most, training.groups_per_step) + 1):
        split = Split(0, 1, workers)
        if trainer_fits(planner, workers) and host_problem(planner, split) is None:
            seconds = planner.training_side(split)
            if best is None or seconds < best[1]:
                best = workers, seconds
        found.append(best)
    return found
