"""Resources that are reserved, the nodes of a cluster, and which node holds which bundle. Pure arithmetic, without Ray.

Invariant: `place` accepts reservations only if every bundle fits inside one node beside the others on that node. A
refusal names the numbers and a way out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from aft_ray.config.run import ConfigError


@dataclass(frozen=True, slots=True)
class Bundle:
    """An amount of CPUs and GPUs inside one node."""

    cpus: float
    gpus: float = 0

    def __str__(self) -> str:
        return " and ".join(amount(value, kind) for value, kind in ((self.gpus, "GPU"), (self.cpus, "CPU")) if value)


@dataclass(frozen=True, slots=True)
class Reservation:
    """What `count` processes or engines of one kind reserve. Each reserves all of `bundles`, which may lie on
    different nodes.

    Attributes:
        name: The kind, in the singular.
        count: How many of them there are.
        bundles: What one of them reserves.
        keys: The config keys that make its bundles smaller.
        note: What the table of reservations says beside it.
    """

    name: str
    count: int
    bundles: tuple[Bundle, ...]
    keys: str = ""
    note: str = ""

    @property
    def each(self) -> Bundle:
        """The sum of the bundles of one of them."""
        return Bundle(sum(bundle.cpus for bundle in self.bundles), sum(bundle.gpus for bundle in self.bundles))

    @property
    def label(self) -> str:
        return f"{self.count} {self.name}{'' if self.count == 1 else 's'}"


@dataclass(frozen=True, slots=True)
class Reservations:
    """Everything that a job reserves at the same time.

    Attributes:
        entries: The reservations, one for each kind of process.
        advice: How to make them smaller or the cluster larger; the end of an error message.
    """

    entries: tuple[Reservation, ...]
    advice: str

    @property
    def cpus(self) -> int:
        return math.ceil(round(sum(entry.count * entry.each.cpus for entry in self.entries), 6))

    @property
    def gpus(self) -> float:
        return round(sum(entry.count * entry.each.gpus for entry in self.entries), 6)

    @property
    def sum(self) -> str:
        """The sum as a formula in one line."""
        return " + ".join(f"{entry.label} x ({entry.each})" for entry in self.entries if entry.count)

    def lines(self) -> list[str]:
        """The sum as a table, one line for each kind of process."""
        rows = [
            (entry.label, f"x {entry.each.cpus:g} CPU", f"{entry.each.gpus:g} GPU", entry.note)
            for entry in self.entries
            if entry.count
        ]
        rows.append(("in all", f"{self.cpus} CPU", f"{self.gpus:g} GPU", ""))
        return [f"{label:<18} {cpu:>9} {gpu:>8}  {note}".rstrip() for label, cpu, gpu, note in rows]


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the cluster, or one that its autoscaler may still start."""

    name: str
    cpus: float
    gpus: float


@dataclass(frozen=True, slots=True)
class NodeGroup:
    """Nodes of one size that an autoscaler starts.

    Attributes:
        name: The autoscaler's name for the group.
        node: What each of its nodes has.
        max_nodes: The most nodes of the group that may run at the same time; None means any number.
    """

    name: str
    node: Bundle
    max_nodes: int | None

    def startable(self, running: int, enough: int) -> list[Node]:
        """The nodes that may still be started while `running` nodes of the group run; at most `enough` of them."""
        count = enough if self.max_nodes is None else min(enough, max(0, self.max_nodes - running))
        return [Node(f"{self.name} (to come)", self.node.cpus, self.node.gpus)] * count


@dataclass(frozen=True, slots=True)
class NodeAssignment:
    """A node and what is placed on it.

    Attributes:
        node: The node.
        bundles: Pairs of a reservation's name and the number of its bundles on this node.
        free: What the node has left.
    """

    node: Node
    bundles: tuple[tuple[str, int], ...]
    free: Bundle

    def line(self) -> str:
        contents = ", ".join(f"{count} {name}{'' if count == 1 else 's'}" for name, count in self.bundles) or "idle"
        used = Bundle(self.node.cpus - self.free.cpus, self.node.gpus - self.free.gpus)
        return (
            f"{self.node.name:<18} {f'{used.cpus:g} of {self.node.cpus:g} CPU':>16} "
            f"{f'{used.gpus:g} of {self.node.gpus:g} GPU':>14}  {contents}"
        )


def amount(value: float, kind: str) -> str:
    """`2 GPUs`, `1 CPU`."""
    return f"{value:g} {kind}{'' if value == 1 else 's'}"


def place(reservations: Reservations, nodes: Sequence[Node], has: str = "has") -> list[NodeAssignment]:
    """Finds a node for every bundle: the largest bundle first, each on the node where it leaves the least free.

    Args:
        reservations: What is to be placed.
        nodes: The nodes of the cluster.
        has: The verb of the error message: the cluster `has` these nodes, or it `can grow to` them.

    Returns:
        One assignment for each node, in the order of `nodes`.

    Raises:
        ConfigError: The nodes do not hold all bundles.
    """
    _check_totals(reservations, nodes, has)
    _check_each_bundle(reservations, nodes)
    free = [Bundle(node.cpus, node.gpus) for node in nodes]
    placed: list[Counter[str]] = [Counter() for _ in nodes]
    wanted = [(bundle, entry) for entry in reservations.entries for _ in range(entry.count) for bundle in entry.bundles]
    wanted.sort(key=lambda pair: (-pair[0].gpus, -pair[0].cpus))
    for number, (bundle, entry) in enumerate(wanted):
        fitting = [index for index, rest in enumerate(free) if _fits(bundle, rest)]
        if not fitting:
            raise ConfigError(_fragmented(reservations, wanted, number, entry, nodes, free))
        best = min(fitting, key=lambda index: (free[index].gpus - bundle.gpus, free[index].cpus - bundle.cpus))
        free[best] = Bundle(round(free[best].cpus - bundle.cpus, 6), round(free[best].gpus - bundle.gpus, 6))
        placed[best][entry.name] += 1
    return [
        NodeAssignment(node, tuple(counts.items()), rest)
        for node, counts, rest in zip(nodes, placed, free, strict=True)
    ]


def _fits(bundle: Bundle, rest: Bundle) -> bool:
    return bundle.cpus <= rest.cpus and bundle.gpus <= rest.gpus


def _check_totals(reservations: Reservations, nodes: Sequence[Node], has: str) -> None:
    for kind, need, have in (
        ("CPU", reservations.cpus, sum(node.cpus for node in nodes)),
        ("GPU", reservations.gpus, sum(node.gpus for node in nodes)),
    ):
        if need > have:
            raise ConfigError(
                f"{need:g} {kind}s are needed and the cluster {has} {have:g}: {reservations.sum}. {reservations.advice}"
            )


def _check_each_bundle(reservations: Reservations, nodes: Sequence[Node]) -> None:
    for entry in reservations.entries:
        for bundle in entry.bundles if entry.count else ():
            if any(_fits(bundle, Bundle(node.cpus, node.gpus)) for node in nodes):
                continue
            largest = max(nodes, key=lambda node: (min(node.gpus, bundle.gpus), node.cpus))
            raise ConfigError(
                f"one {entry.name} needs {bundle} in one node, and the largest has "
                f"{Bundle(largest.cpus, largest.gpus)}: lower {entry.keys}, or add larger nodes"
            )


def _fragmented(
    reservations: Reservations,
    wanted: Sequence[tuple[Bundle, Reservation]],
    number: int,
    entry: Reservation,
    nodes: Sequence[Node],
    free: Sequence[Bundle],
) -> str:
    """The error message when the totals suffice and every bundle fits on an empty node, but not all at once."""
    done = sum(other is entry for _, other in wanted[:number])
    rest = Counter((left.gpus, left.cpus) for left in free if left.cpus or left.gpus)
    leftover = ", ".join(
        f"{Bundle(cpus, gpus)}{f' on each of {count} nodes' if count > 1 else ' on one node'}"
        for (gpus, cpus), count in sorted(rest.items(), reverse=True)
    )
    return (
        f"the cluster's {amount(len(nodes), 'node')} are large enough in total, but not node by node: "
        f"{reservations.sum}; {done} of {entry.count * len(entry.bundles)} times {wanted[number][0]} for the "
        f"{entry.name}s have a node, and {leftover or 'nothing'} is left. {reservations.advice}"
    )
