"""Which of the train workers' GPUs each engine uses when both share GPUs (`sampling.colocate`). Pure, without Ray.

Invariant: the GPUs of an engine lie in one node, and no GPU belongs to two engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WorkerPlacement:
    """Where a train worker runs.

    Attributes:
        rank: The worker's rank.
        workers: The number of all train workers.
        node: Ray's id of its node.
        gpus: The GPU ids that Ray gave it, unique in its node; empty on the CPU.
        incarnation: A name that train workers have in common which were started together, and no others.
    """

    rank: int
    workers: int
    node: str
    gpus: tuple[str, ...]
    incarnation: str = ""


@dataclass(frozen=True, slots=True)
class EnginePlacement:
    """Where an engine is to run: the id of a node and the ids of GPUs in it."""

    node: str
    gpus: tuple[str, ...]


def engine_placements(workers: Sequence[WorkerPlacement], engines: int, gpus: int) -> tuple[EnginePlacement, ...]:
    """Chooses the GPUs of every engine among those of the train workers.

    Args:
        workers: The placements of all train workers, in any order.
        engines: The number of engines.
        gpus: The number of GPUs of one engine. With 0 the engines are spread over the workers' nodes in turn.

    Returns:
        One placement for each engine; the same for any order of `workers`.

    Raises:
        ValueError: The workers' GPUs lie on nodes so that fewer engines fit.
    """
    gpus_of_node: dict[str, list[str]] = {}
    for worker in sorted(workers, key=lambda worker: worker.rank):
        gpus_of_node.setdefault(worker.node, []).extend(worker.gpus)
    if gpus == 0:
        nodes = list(gpus_of_node)
        return tuple(EnginePlacement(nodes[index % len(nodes)], ()) for index in range(engines))
    found = [
        EnginePlacement(node, tuple(ids[start : start + gpus]))
        for node, ids in gpus_of_node.items()
        for start in range(0, len(ids) - gpus + 1, gpus)
    ]
    if len(found) < engines:
        counts = ", ".join(str(len(ids)) for ids in gpus_of_node.values())
        raise ValueError(
            f"{engines} colocated samplers need {gpus} GPUs in one node each, and the train workers' GPUs lie on nodes "
            f"as {counts}: {len(found)} fit; lower sampling.samplers or sampling.tensor_parallel_size"
        )
    return tuple(found[:engines])
