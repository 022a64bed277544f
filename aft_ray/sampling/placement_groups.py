"""The placement group of a sampler: what Ray keeps for one engine, inside a node or over several.

Invariant: one group an engine, and none inside it: vLLM's Ray executor takes the group that its actor lies in. The
processes of a stage share a node; only stages may be on different ones.
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
from aft_ray.cluster.placement import Bundle, amount
from aft_ray.config.run import SamplingConfig
from aft_ray.sampling.sampler_health import SamplersFailed

_POLL_S = 1.0


def group_bundles(sampling: SamplingConfig) -> list[dict[str, float]]:
    """The bundles of a sampler's group; Ray keeps each in one node. vLLM's Ray executor wants one GPU in a bundle."""
    if not sampling.spans_nodes:
        return [_resources(sampling.cpus_per_sampler, sampling.gpus_per_sampler)]
    processes = sampling.processes_per_sampler
    return [_resources(sampling.cpus_per_sampler / processes, 1)] * processes


def _resources(cpus: float, gpus: float) -> dict[str, float]:
    return {kind: value for kind, value in (("CPU", cpus), ("GPU", gpus)) if value}


def open_group(index: int, sampling: SamplingConfig) -> PlacementGroup:
    """Asks for a sampler's group; it may come much later, when the cluster has grown."""
    return placement_group(
        group_bundles(sampling), strategy="PACK" if sampling.spans_nodes else "STRICT_PACK", name=f"sampler-{index}"
    )


def actor_options(group: PlacementGroup, sampling: SamplingConfig) -> dict[str, Any]:
    """How the sampler's actor lies in its group.

    Inside a node it has all the GPUs itself, in CUDA_VISIBLE_DEVICES, and its engine's processes inherit them. Over
    nodes it has none: vLLM starts an actor in every bundle, each with the GPU of its own.
    """
    spans = sampling.spans_nodes
    return {
        "num_cpus": 0 if spans else sampling.cpus_per_sampler,
        "num_gpus": 0 if spans else sampling.gpus_per_sampler,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(
            placement_group=group, placement_group_bundle_index=0, placement_group_capture_child_tasks=spans
        ),
    }


def colocated_options(placement: EnginePlacement, sampling: SamplingConfig) -> dict[str, Any]:
    """How an actor lies beside train workers: on their node, with GPUs that Ray has given to them."""
    return {
        "num_cpus": sampling.cpus_per_sampler,
        "num_gpus": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(placement.node, soft=False),
    }


def close_groups(groups: Iterable[PlacementGroup]) -> None:
    """Gives back what the groups keep. Their actors must have ended."""
    for group in groups:
        remove_placement_group(group)


def wait_for_group(tensor_parallel_size: int, timeout_s: float) -> None:
    """Inside an actor whose engine spans nodes: waits until every bundle of its group has a node.

    An actor that starts again after a node was lost may be there before the other bundles are. Raises SamplersFailed
    when they do not come, or when the processes of a stage would lie on different nodes.
    """
    group = ray.util.get_current_placement_group()
    assert group is not None, "a sampler that spans nodes was started outside a placement group"
    deadline = time.monotonic() + timeout_s
    while (table := placement_group_table(group))["state"] != "CREATED":
        if time.monotonic() > deadline:
            raise SamplersFailed(f"{waits_for(group)}; sampling.start_timeout_s ({timeout_s:.0f} s) sets the deadline")
        time.sleep(_POLL_S)
    counts = Counter(table["bundles_to_node_id"].values())
    if not stages_are_whole(counts.values(), tensor_parallel_size):
        raise SamplersFailed(
            f"an engine's processes lie on nodes as {', '.join(map(str, sorted(counts.values())))}: the "
            f"{tensor_parallel_size} of a stage (sampling.tensor_parallel_size) must share a node. Free whole nodes "
            f"for it, or choose a size that divides a node's GPUs"
        )


def stages_are_whole(processes_on_nodes: Iterable[int], tensor_parallel_size: int) -> bool:
    """Whether so many processes on each node are whole stages; vLLM numbers its processes node by node."""
    return all(count % tensor_parallel_size == 0 for count in processes_on_nodes)


def waits_for(group: PlacementGroup) -> str:
    """What a sampler that never answered waits for, with what the cluster has free."""
    table = placement_group_table(group)
    if table["state"] == "CREATED":
        return "its engine has not started yet"
    if table["state"] == "REMOVED":
        return "its placement group was removed"
    bundles = Counter(Bundle(b.get("CPU", 0), b.get("GPU", 0)) for b in table["bundles"].values())
    wanted = " + ".join(
        f"{f'{count} times ' if count > 1 else ''}{bundle} in one node" for bundle, count in bundles.items()
    )
    return f"it waits for {wanted}; free are {free_lines()}"


def free_lines() -> str:
    """What every node has free, in a few words."""
    from ray._private.state import available_resources_per_node

    names = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    free = sorted(
        (names[node], f"{amount(have.get('GPU', 0), 'GPU')} and {amount(have.get('CPU', 0), 'CPU')}")
        for node, have in available_resources_per_node().items()
        if node in names
    )
    return ", ".join(f"{what} on {name}" for name, what in free) or "no nodes"
