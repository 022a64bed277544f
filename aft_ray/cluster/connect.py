"""Connects to the Ray cluster of a job, or starts one on this machine, and checks that the cluster holds the job.

Invariant: the check counts the nodes that run and those that the cluster's autoscaler may add, and it happens before
any actor starts.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from aft_ray.cluster import compat
from aft_ray.cluster.placement import Bundle, Node, NodeAssignment, NodeGroup, Reservations, place
from aft_ray.config.run import ClusterConfig, ConfigError

# Where Ray's cluster launcher leaves the cluster's config on its head node.
_LAUNCHER_CONFIG = Path("~/ray_bootstrap_config.yaml")
# The label in which a node that an autoscaler started carries the name of its group.
_GROUP_LABEL = "ray.io/node-group"
# How often `start_ray` tries to start Ray, and the part of Ray's error message that says that it was too slow.
_STARTS, _TOO_SLOW = 4, "timed out during startup"
_RAY_DEFAULT_MAX_WORKERS = 2


def placement_table(cluster: ClusterConfig, reservations: Reservations) -> list[str]:
    """The lines that `--dry-run` prints: what is reserved and, if a cluster's address is known, on which of its nodes.

    Raises:
        ConfigError: No cluster answers at the address, or the cluster does not hold the reservations.
    """
    if not _address(cluster):
        return reservations.lines()
    with connected(cluster, reservations) as assignments:
        return [*reservations.lines(), "", "on the cluster's nodes:", *(node.line() for node in assignments)]


def _address(cluster: ClusterConfig) -> str | None:
    return cluster.address or os.environ.get("RAY_ADDRESS")


@contextlib.contextmanager
def connected(cluster: ClusterConfig, reservations: Reservations) -> Iterator[list[NodeAssignment]]:
    """Connects to `cluster.address`, to RAY_ADDRESS, or to a Ray that it starts here, and disconnects at the end.

    A connection that exists already is used, and is kept at the end.

    Yields:
        A possible placement on the nodes; Ray itself decides which node each process gets. Empty when
        `cluster.grows` is set and the present nodes do not hold the reservations.

    Raises:
        ConfigError: No cluster answers at the address, or the cluster does not hold the reservations.
    """
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield _check(cluster, reservations)
        return
    address = _address(cluster)
    # Ray's own lines go to its session directory and to the run's logs, not to the terminal.
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            cpus = max(cluster.logical_cpus or reservations.cpus, reservations.cpus)
            start_ray(num_cpus=cpus, object_store_memory=cluster.object_store_mib << 20, **quiet)
    except ConnectionError as error:
        raise ConfigError(
            f"no Ray cluster answers at {address}; start one with `ray start --head`, or leave cluster.address and "
            f"RAY_ADDRESS unset to have one started here"
        ) from error
    try:
        yield _check(cluster, reservations)
    finally:
        ray.shutdown()


def start_ray(**options: Any) -> None:
    """Starts a Ray cluster on this machine for this process alone.

    Ray gives its own processes half a minute to start. A busy machine may need longer for their imports, so a start
    that timed out is repeated a few times.

    Args:
        options: Arguments of `ray.init`.

    Raises:
        ConfigError: Every start timed out.
    """
    import ray

    for _ in range(_STARTS):
        try:
            ray.init(address="local", include_dashboard=False, **options)
            return
        except Exception as error:
            if _TOO_SLOW not in str(error):
                raise
            compat.kill_failed_start(error)
    raise ConfigError(
        f"Ray did not come up on this machine within half a minute, {_STARTS} times: too much else runs here, or its "
        "memory is full; wait for it or free it, or name a cluster with cluster.address"
    )


def _check(cluster: ClusterConfig, reservations: Reservations) -> list[NodeAssignment]:
    """Places the reservations on the nodes that run and, where needed, on those that may be started."""
    running = live_nodes()
    nodes = [node for node, _ in running]
    if cluster.grows:
        with contextlib.suppress(ConfigError):
            return place(reservations, nodes)
        return []
    running_of_group = Counter(group for _, group in running)
    bundles = sum(entry.count * len(entry.bundles) for entry in reservations.entries)
    more = [node for group in autoscaled_groups() for node in group.startable(running_of_group[group.name], bundles)]
    return place(reservations, [*nodes, *more], "can grow to" if more else "has")


def live_nodes() -> list[tuple[Node, str]]:
    """The running nodes, sorted by name, each with the name of its node group; "" for a node without a group."""
    import ray

    nodes = []
    for node in ray.nodes():
        if node["Alive"]:
            resources = node["Resources"]
            size = Node(f"{node['NodeManagerAddress']}", resources.get("CPU", 0), resources.get("GPU", 0))
            nodes.append((size, node["Labels"].get(_GROUP_LABEL, "")))
    return sorted(nodes, key=lambda pair: pair[0].name)


def autoscaled_groups() -> list[NodeGroup]:
    """The groups of nodes that the cluster's autoscaler may start.

    They come from Ray if its autoscaler reports them, else from the config that `ray up` leaves on the head node.
    Empty when neither says anything.
    """
    config = compat.autoscaler_config()
    if config is not None and config.node_group_configs:
        return [
            NodeGroup(
                group.name,
                Bundle(group.resources.get("CPU", 0), group.resources.get("GPU", 0)),
                group.max_count if group.max_count >= 0 else None,
            )
            for group in config.node_group_configs
        ]
    file = _LAUNCHER_CONFIG.expanduser()
    return launcher_groups(yaml.safe_load(file.read_text())) if file.exists() else []


def launcher_groups(config: dict[str, Any]) -> list[NodeGroup]:
    """The worker groups of a `ray up` config, as the launcher leaves it on the head node."""
    max_workers = config.get("max_workers", _RAY_DEFAULT_MAX_WORKERS)
    return [
        NodeGroup(
            name,
            Bundle(node_type.get("resources", {}).get("CPU", 0), node_type.get("resources", {}).get("GPU", 0)),
            min(max_workers, node_type.get("max_workers", max_workers)),
        )
        for name, node_type in config.get("available_node_types", {}).items()
        if name != config.get("head_node_type")
    ]
