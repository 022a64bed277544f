"""What a run reserves, and whether the nodes of a cluster can hold it: arithmetic alone, without Ray.

Invariant: a plan that is accepted has a place for each of its bundles inside one node; a refusal names the numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from aft_ray.config.run import ConfigError


@dataclass(frozen=True, slots=True)
class Bundle:
    """What must lie inside one node."""

    cpus: float
    gpus: float = 0.0

    def __str__(self) -> str:
        return " and ".join(amount(value, kind) for value, kind in ((self.gpus, "GPU"), (self.cpus, "CPU")) if value)


@dataclass(frozen=True, slots=True)
class Reservation:
    """`count` things alike, each of `bundles`; the bundles of one may lie on different nodes.

    name: of one of them. keys: the config keys that make its bundles smaller. note: what the table says beside it.
    """

    name: str
    count: int
    bundles: tuple[Bundle, ...]
    keys: str = ""
    note: str = ""

    @property
    def each(self) -> Bundle:
        """One of them, all its bundles together."""
        return Bundle(sum(bundle.cpus for bundle in self.bundles), sum(bundle.gpus for bundle in self.bundles))

    @property
    def label(self) -> str:
        return f"{self.count} {self.name}{'' if self.count == 1 else 's'}"


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the cluster, or one that the cluster may still start."""

    name: str
    cpus: float
    gpus: float


@dataclass(frozen=True, slots=True)
class NodeGroup:
    """Alike nodes of which an autoscaler may run `most`; None: any number."""

    name: str
    each: Bundle
    most: int | None

    def to_come(self, started: int, enough: int) -> list[Node]:
        """The nodes that may still come beside those that run; never more than `enough`."""
        count = enough if self.most is None else min(enough, max(0, self.most - started))
        return [Node(f"{self.name} (to come)", self.each.cpus, self.each.gpus)] * count


@dataclass(frozen=True, slots=True)
class Placement:
    """Everything that is reserved at once. `advice` is the way out when it is too much."""

    parts: tuple[Reservation, ...]
    advice: str

    @property
    def cpus(self) -> int:
        return math.ceil(round(sum(part.count * part.each.cpus for part in self.parts), 6))

    @property
    def gpus(self) -> float:
        return round(sum(part.count * part.each.gpus for part in self.parts), 6)

    def lines(self) -> list[str]:
        """The arithmetic as a table, a line each part."""
        rows = [
            (part.label, f"{part.each.cpus:g} CPU", f"{part.each.gpus:g} GPU", part.note)
            for part in self.parts
            if part.count
        ]
        rows = [(label, f"x {cpu}", gpu, note) for label, cpu, gpu, note in rows]
        rows.append(("in all", f"{self.cpus} CPU", f"{self.gpus:g} GPU", ""))
        return [f"{label:<18} {cpu:>9} {gpu:>8}  {note}".rstrip() for label, cpu, gpu, note in rows]

    @property
    def sum(self) -> str:
        """The arithmetic as a sentence."""
        return " + ".join(f"{part.label} x ({part.each})" for part in self.parts if part.count)


@dataclass(frozen=True, slots=True)
class NodeAssignment:
    """A node and what lies on it: how many bundles of which part."""

    node: Node
    bundles: tuple[tuple[str, int], ...]
    free: Bundle

    def line(self) -> str:
        there = ", ".join(f"{count} {name}{'' if count == 1 else 's'}" for name, count in self.bundles) or "idle"
        used = Bundle(self.node.cpus - self.free.cpus, self.node.gpus - self.free.gpus)
        return (
            f"{self.node.name:<18} {f'{used.cpus:g} of {self.node.cpus:g} CPU':>16} "
            f"{f'{used.gpus:g} of {self.node.gpus:g} GPU':>14}  {there}"
        )


def amount(value: float, kind: str) -> str:
    """`2 GPUs`, `1 CPU`."""
    return f"{value:g} {kind}{'' if value == 1 else 's'}"


def place(placement: Placement, nodes: Sequence[Node], has: str = "has") -> list[NodeAssignment]:
    """A node for every bundle, the largest first, each where the least is left over. Raises ConfigError.

    has: what the sentence says of the cluster's nodes: it `has` them or `can grow to` them.
    """
    _check_sums(placement, nodes, has)
    _check_each(placement, nodes)
    free = [Bundle(node.cpus, node.gpus) for node in nodes]
    placed: list[Counter[str]] = [Counter() for _ in nodes]
    wanted = [(bundle, part) for part in placement.parts for _ in range(part.count) for bundle in part.bundles]
    wanted.sort(key=lambda one: (-one[0].gpus, -one[0].cpus))
    for number, (bundle, part) in enumerate(wanted):
        fitting = [index for index, rest in enumerate(free) if _fits(bundle, rest)]
        if not fitting:
            raise ConfigError(_scattered(placement, wanted, number, part, nodes, free))
        best = min(fitting, key=lambda index: (free[index].gpus - bundle.gpus, free[index].cpus - bundle.cpus))
        free[best] = Bundle(round(free[best].cpus - bundle.cpus, 6), round(free[best].gpus - bundle.gpus, 6))
        placed[best][part.name] += 1
    return [
        NodeAssignment(node, tuple(counts.items()), rest)
        for node, counts, rest in zip(nodes, placed, free, strict=True)
    ]


def _fits(bundle: Bundle, rest: Bundle) -> bool:
    return bundle.cpus <= rest.cpus and bundle.gpus <= rest.gpus


def _check_sums(placement: Placement, nodes: Sequence[Node], has: str) -> None:
    for kind, need, have in (
        ("CPU", placement.cpus, sum(node.cpus for node in nodes)),
        ("GPU", placement.gpus, sum(node.gpus for node in nodes)),
    ):
        if need > have:
            raise ConfigError(
                f"{need:g} {kind}s are needed and the cluster {has} {have:g}: {placement.sum}. {placement.advice}"
            )


def _check_each(placement: Placement, nodes: Sequence[Node]) -> None:
    for part in placement.parts:
        for bundle in part.bundles if part.count else ():
            if any(_fits(bundle, Bundle(node.cpus, node.gpus)) for node in nodes):
                continue
            largest = max(nodes, key=lambda node: (min(node.gpus, bundle.gpus), node.cpus))
            raise ConfigError(
                f"one {part.name} needs {bundle} in one node, and the largest has "
                f"{Bundle(largest.cpus, largest.gpus)}: lower {part.keys}, or add larger nodes"
            )


def _scattered(
    placement: Placement,
    wanted: Sequence[tuple[Bundle, Reservation]],
    number: int,
    part: Reservation,
    nodes: Sequence[Node],
    free: Sequence[Bundle],
) -> str:
    """The sums are enough and every bundle fits somewhere, but not all at once."""
    done = sum(other is part for _, other in wanted[:number])
    rest = Counter((one.gpus, one.cpus) for one in free if one.cpus or one.gpus)
    left = ", ".join(
        f"{Bundle(cpus, gpus)}{f' on each of {count} nodes' if count > 1 else ' on one node'}"
        for (gpus, cpus), count in sorted(rest.items(), reverse=True)
    )
    return (
        f"the cluster's {amount(len(nodes), 'node')} are large enough in all, but not node by node: {placement.sum}; "
        f"{done} of {part.count * len(part.bundles)} times {wanted[number][0]} for the {part.name}s have a node, and "
        f"{left or 'nothing'} is left. {placement.advice}"
    )
