"""The Ray cluster of a run: found or started here, checked against what the run needs before any actor starts.

A run is held against the nodes that are there and those that the cluster's autoscaler may add.
"""

from __future__ import annotations

import contextlib
import logging
import os
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from aft_ray.cluster.placement import Bundle, Node, NodeAssignment, NodeGroup, Placement, Reservation, amount, place
from aft_ray.config.run import ClusterConfig, ConfigError, RunConfig, SamplingConfig
from aft_ray.config.serve import ServeConfig

# For Ray Data's own tasks (labelling, writing) and the forwarding actor, beside samplers and train workers.
DATA_CPUS = 2
# Where Ray's cluster launcher leaves the cluster's config on its head node.
_LAUNCHER_CONFIG = Path("~/ray_bootstrap_config.yaml")
# The label in which a node that an autoscaler started carries the name of its group.
_GROUP_LABEL = "ray.io/node-group"
# How often a Ray is started here before it is given up, and what Ray says when it was too slow.
_STARTS, _TOO_SLOW = 4, "timed out during startup"


def training_placement(config: RunConfig) -> Placement:
    """What `aft-ray train` reserves. Samplers are left out when nothing is sampled or evaluated."""
    return _placement(config, config.sampling.samplers if needs_samplers(config) else 0, config.training.workers)


def evaluation_placement(config: RunConfig) -> Placement:
    """What `aft-ray evaluate` reserves. There are no train workers to share GPUs with."""
    alone = config.sampling.model_copy(update={"colocate": False})
    return _placement(config.model_copy(update={"sampling": alone}), config.sampling.samplers, 0)


def needs_samplers(config: RunConfig) -> bool:
    return (config.samples and config.rounds.count > 0) or config.rounds.evaluate_every > 0


def sampler_bundles(sampling: SamplingConfig) -> tuple[Bundle, ...]:
    """What a sampler reserves, by node: its stages may lie on different nodes, the processes of a stage may not."""
    stages = sampling.pipeline_parallel_size if sampling.spans_nodes else 1
    if sampling.colocate:
        return (Bundle(sampling.cpus_per_sampler),)
    return (Bundle(sampling.cpus_per_sampler / stages, sampling.gpus_per_sampler / stages),) * stages


def _placement(config: RunConfig, samplers: int, workers: int) -> Placement:
    sampling, training = config.sampling, config.training
    stages = f"{sampling.pipeline_parallel_size} stages of " if sampling.pipeline_parallel_size > 1 else ""
    processes = f"{stages}{sampling.tensor_parallel_size} in one node" if sampling.processes_per_sampler > 1 else ""
    if sampling.colocate:
        processes = f"on the train workers' GPUs in turn, {amount(sampling.gpus_per_sampler, 'GPU')} each"
    return Placement(
        (
            Reservation(
                "sampler",
                samplers,
                sampler_bundles(sampling),
                "sampling.tensor_parallel_size or sampling.cpus_per_sampler",
                processes,
            ),
            Reservation(
                "train worker",
                workers,
                (Bundle(training.cpus_per_worker, training.gpus_per_worker),),
                "training.cpus_per_worker",
            ),
            Reservation("Ray Data task", DATA_CPUS, (Bundle(1),)),
        ),
        "Lower sampling.samplers or training.workers, or add nodes",
    )


def serving_placement(config: ServeConfig) -> Placement:
    """What `aft-ray serve` reserves when it starts; engines that autoscaling adds come on top."""
    engine, reasoner = config.engine, config.reasoner
    processes = engine.tensor_parallel_size * engine.pipeline_parallel_size
    in_node = processes if engine.pipeline_parallel_size == 1 else 1
    return Placement(
        (
            Reservation(
                "engine",
                engine.replicas,
                (Bundle(engine.cpus * in_node, engine.gpus * in_node),) * (processes // in_node),
                "engine.tensor_parallel_size or engine.cpus",
            ),
            Reservation("reasoner", reasoner.replicas, (Bundle(reasoner.cpus),), "reasoner.cpus"),
        ),
        "Lower engine.replicas or reasoner.replicas, or add nodes",
    )


def plan_lines(cluster: ClusterConfig, placement: Placement) -> list[str]:
    """The arithmetic of a run and, where an address of a cluster is known, what would lie on which of its nodes.

    Raises ConfigError when the cluster cannot hold it.
    """
    if not _address(cluster):
        return placement.lines()
    with connected(cluster, placement) as places:
        return [*placement.lines(), "", "on the cluster's nodes:", *(one.line() for one in places)]


def _address(cluster: ClusterConfig) -> str | None:
    return cluster.address or os.environ.get("RAY_ADDRESS")


@contextlib.contextmanager
def connected(cluster: ClusterConfig, placement: Placement) -> Iterator[list[NodeAssignment]]:
    """Connects to `cluster.address`, RAY_ADDRESS or a Ray started here, and leaves it at the end.

    Yields what would lie on which node; in the end Ray decides. Raises ConfigError with the arithmetic when the
    cluster cannot hold the run.
    """
    # Ours are the lines on the terminal; Ray's go to its session directory and to the run's logs.
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield _check(cluster, placement)
        return
    address = _address(cluster)
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            cpus = max(cluster.logical_cpus or placement.cpus, placement.cpus)
            start_ray(num_cpus=cpus, object_store_memory=cluster.object_store_mib << 20, **quiet)
    except ConnectionError as error:
        raise ConfigError(
            f"no Ray cluster answers at {address}; start one with `ray start --head`, or leave cluster.address and "
            f"RAY_ADDRESS unset to have one started here"
        ) from error
    try:
        yield _check(cluster, placement)
    finally:
        ray.shutdown()


def start_ray(**options: Any) -> None:
    """A Ray on this machine for this process alone, by `ray.init`'s options; again when it is too slow.

    Ray gives its processes half a minute, which a busy machine may need for their imports. Raises ConfigError.
    """
    import ray
    from ray._private.node import Node

    for _ in range(_STARTS):
        try:
            ray.init(address="local", include_dashboard=False, **options)
            return
        except Exception as error:
            if _TOO_SLOW not in str(error):
                raise
            for frame, _ in traceback.walk_tb(error.__traceback__):
                if isinstance(node := frame.f_locals.get("self"), Node):
                    node.kill_all_processes(check_alive=False, allow_graceful=False)
    raise ConfigError(
        f"Ray did not come up on this machine within half a minute, {_STARTS} times: too much else runs here, or its "
        "memory is full; wait for it or free it, or name a cluster with cluster.address"
    )


def _check(cluster: ClusterConfig, placement: Placement) -> list[NodeAssignment]:
    """Holds a plan against the nodes that are there and those that may come."""
    there = live_nodes()
    nodes = [node for node, _ in there]
    if cluster.grows:
        with contextlib.suppress(ConfigError):
            return place(placement, nodes)
        return []
    started = Counter(group for _, group in there)
    bundles = sum(part.count * len(part.bundles) for part in placement.parts)
    more = [node for group in autoscaled_groups() for node in group.to_come(started[group.name], bundles)]
    return place(placement, [*nodes, *more], "can grow to" if more else "has")


def live_nodes() -> list[tuple[Node, str]]:
    """The cluster's nodes, each with the name of its node group; "" where it has none."""
    import ray

    nodes = []
    for node in ray.nodes():
        if node["Alive"]:
            have = node["Resources"]
            name = f"{node['NodeManagerAddress']}"
            nodes.append((Node(name, have.get("CPU", 0), have.get("GPU", 0)), node["Labels"].get(_GROUP_LABEL, "")))
    return sorted(nodes, key=lambda one: one[0].name)


def autoscaled_groups() -> list[NodeGroup]:
    """The groups of nodes that the cluster's autoscaler may start, where Ray or its launcher says what they are."""
    from ray._private.state import state

    config = state.get_cluster_config()
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
    most = config.get("max_workers", 2)  # Ray's default
    return [
        NodeGroup(
            name,
            Bundle(kind.get("resources", {}).get("CPU", 0), kind.get("resources", {}).get("GPU", 0)),
            min(most, kind.get("max_workers", most)),
        )
        for name, kind in config.get("available_node_types", {}).items()
        if name != config.get("head_node_type")
    ]
