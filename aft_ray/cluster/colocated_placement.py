"""Which GPUs engines share with the train workers when the two take turns (`sampling.colocate`). Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WorkerPlacement:
    """Where a train worker sits. gpus: the ids that Ray gave it, unique in its node; none on the CPU."""

    rank: int
    workers: int
    node: str
    gpus: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EnginePlacement:
    """Where an engine goes: a node, and those GPUs in it."""

    node: str
    gpus: tuple[str, ...]


def engine_placements(placements: Sequence[WorkerPlacement], engines: int, gpus: int) -> tuple[EnginePlacement, ...]:
    """A seat for every engine: `gpus` of the workers' GPUs, all in one node; with 0, a node that has workers.

    Raises ValueError when the workers lie so that fewer engines fit.
    """
    by_node: dict[str, list[str]] = {}
    for seat in sorted(placements, key=lambda one: one.rank):
        by_node.setdefault(seat.node, []).extend(seat.gpus)
    if gpus == 0:
        nodes = list(by_node)
        return tuple(EnginePlacement(nodes[index % len(nodes)], ()) for index in range(engines))
    found = [
        EnginePlacement(node, tuple(there[start : start + gpus]))
        for node, there in by_node.items()
        for start in range(0, len(there) - gpus + 1, gpus)
    ]
    if len(found) < engines:
        counts = ", ".join(str(len(there)) for there in by_node.values())
        raise ValueError(
            f"{engines} colocated samplers need {gpus} GPUs in one node each, and the train workers' GPUs lie on nodes "
            f"as {counts}: {len(found)} fit; lower sampling.samplers or sampling.tensor_parallel_size"
        )
    return tuple(found[:engines])
