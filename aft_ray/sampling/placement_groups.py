"""The Ray placement group of a sampler, which reserves the resources of one engine on one node or on several.

Invariant: one placement group for each engine, in which vLLM's Ray executor starts the engine's processes; vLLM creates
none of its own. The processes of one pipeline stage share a node; only different stages may be on different nodes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from aft_ray.cluster.colocated_placement import EnginePlacement
from aft_ray.cluster.compat import free_resources_by_node
from aft_ray.cluster.placement import Bundle, amount
from aft_ray.cluster.reservations import placement_group_bundles, stages_are_whole
from aft_ray.config.run import SamplingConfig
from aft_ray.sampling.sampler_health import SamplersFailed

_POLL_INTERVAL_S = 1.0


def create_placement_group(index: int, sampling: SamplingConfig) -> PlacementGroup:
    """Requests a sampler's placement group. Ray may create it much later, when the cluster has grown."""
    return placement_group(
        placement_group_bundles(sampling),
        strategy="PACK" if sampling.spans_nodes else "STRICT_PACK",
        name=f"sampler-{index}",
    )


def actor_options(group: PlacementGroup, sampling: SamplingConfig) -> dict[str, Any]:
    """Ray's options for a sampler's actor in its placement group.

    On a single node the actor has all the GPUs, in CUDA_VISIBLE_DEVICES, and its engine's processes inherit them. Over
    several nodes it has none: vLLM starts an actor in every bundle, each with one GPU.
    """
    spans = sampling.spans_nodes
    return {
        "num_cpus": 0 if spans else sampling.cpus_per_sampler,
        "num_gpus": 0 if spans else sampling.gpus_per_sampler,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(
            placement_group=group, placement_group_bundle_index=0, placement_group_capture_child_tasks=spans
        ),
    }


def colocated_actor_options(placement: EnginePlacement, sampling: SamplingConfig) -> dict[str, Any]:
    """Ray's options for an actor on the node of train workers, whose GPUs it uses without reserving them."""
    return {
        "num_cpus": sampling.cpus_per_sampler,
        "num_gpus": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(placement.node, soft=False),
    }


def remove_placement_groups(groups: Iterable[PlacementGroup]) -> None:
    """Releases the resources of placement groups. Their actors must have ended."""
    for group in groups:
        remove_placement_group(group)


def wait_for_placement_group(tensor_parallel_size: int, timeout_s: float) -> None:
    """Inside an actor whose engine spans nodes: waits until every bundle of its placement group has a node.

    An actor that is restarted after a node was lost may start before the other bundles have a node again.

    Raises:
        SamplersFailed: the bundles have no nodes after `timeout_s` seconds, or the processes of one stage would be on
            different nodes.
    """
    group = ray.util.get_current_placement_group()
    assert group is not None, "a sampler that spans nodes was started outside a placement group"
    deadline = time.monotonic() + timeout_s
    while (table := placement_group_table(group))["state"] != "CREATED":
        if time.monotonic() > deadline:
            raise SamplersFailed(
                f"{why_not_started(group)}; sampling.start_timeout_s ({timeout_s:.0f} s) sets the deadline"
            )
        time.sleep(_POLL_INTERVAL_S)
    counts = Counter(table["bundles_to_node_id"].values())
    if not stages_are_whole(counts.values(), tensor_parallel_size):
        raise SamplersFailed(
            f"an engine has {', '.join(map(str, sorted(counts.values())))} processes on its nodes, and the "
            f"{tensor_parallel_size} processes of a stage (sampling.tensor_parallel_size) must share a node; free "
            f"whole nodes for it, or choose a size that divides a node's GPUs"
        )


def why_not_started(group: PlacementGroup) -> str:
    """Why the sampler of a placement group does not answer yet: what it waits for, and what the cluster has free."""
    table = placement_group_table(group)
    if table["state"] == "CREATED":
        return "its engine has not started yet"
    if table["state"] == "REMOVED":
        return "its placement group was removed"
    bundles = Counter(Bundle(b.get("CPU", 0), b.get("GPU", 0)) for b in table["bundles"].values())
    needed = " + ".join(
        f"{f'{count} times ' if count > 1 else ''}{bundle} in one node" for bundle, count in bundles.items()
    )
    return f"it waits for {needed}; free are {_free_resources()}"


def _free_resources() -> str:
    """The free GPUs and CPUs of every node, as a phrase."""
    names = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    free = sorted(
        (names[node], f"{amount(have.get('GPU', 0), 'GPU')} and {amount(have.get('CPU', 0), 'CPU')}")
        for node, have in free_resources_by_node().items()
        if node in names
    )
    return ", ".join(f"{resources} on {name}" for name, resources in free) or "no nodes"
