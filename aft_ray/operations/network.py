"""The bandwidth between nodes: what a config needs, and whether the measured all-reduce gives it.

Invariant: a cluster fails for its bandwidth only if the config that it was checked for needs more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from aft_ray.config.run import ConfigError, RunConfig
from aft_ray.operations.findings import CLUSTER, AllReduceFacts, BandwidthNeed, ClusterFacts, Finding, NodeFacts
from aft_ray.planning.plan.architecture import architecture_of
from aft_ray.planning.plan.assumptions import PlanAssumptions
from aft_ray.planning.plan.hardware import NODES
from aft_ray.planning.plan.quantities import GB, gigabytes

# GB/s of bus bandwidth that the full training of a model needs whose weights take this many bytes or more (about 50
# billion parameters in bfloat16), if ZeRO-3 gathers them between nodes in every pass. That is the network of a node
# with eight A100 (400 Gbit/s): with less, the weights travel longer than a micro-batch of usual size computes.
LARGE_MODEL, LARGE_MODEL_GB_S = 100 * GB, 50.0
# GB/s under which an all-reduce over CPUs points to a wrong interface, whatever the config.
SLOW_GB_S = 0.1
# Processes lock the memory that RDMA adapters write to: a few GiB each.
MEMLOCK = 16 << 30
_INTERFACES = "set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to the interface between the nodes on every node"


def bandwidth_needed(config: RunConfig) -> BandwidthNeed | None:
    """The bandwidth that training needs between nodes; None if it needs little, or the model's sizes are not known.

    The need is the bandwidth at which the bytes of a pass travel as long as the pass computes. The bytes are
    `_weights_moved` times those of the weights. A pass computes 6 FLOPs for each parameter and token, 4 with LoRA, and
    2 more with activation checkpointing, on an H100 at the utilisation that a plan assumes. No model is asked for more
    than LARGE_MODEL_GB_S, which is what the full training of a large one is always asked for.
    """
    training = config.training
    if not training.gpus_per_worker or training.workers < 2 or training.zero_stage != 3:
        return None
    try:
        model = architecture_of(config)
    except (ConfigError, OSError):
        return None  # an architecture that a plan cannot size, or a model that is not here
    weights = (2 if config.model.dtype == "bfloat16" else 4) * model.parameters
    moved = _weights_moved(config)
    most = LARGE_MODEL_GB_S * moved / 3
    if weights >= LARGE_MODEL:
        return BandwidthNeed(most, training.workers, f"ZeRO-3 moves {moved:g} x {gigabytes(weights)} in every pass")
    factor = (6 if config.lora is None else 4) + (2 if training.activation_checkpointing == "full" else 0)
    flops = factor * model.parameters * training.tokens_per_microbatch
    seconds = flops / (NODES["h100-80gb"].gpu_tflops * 1e12 * PlanAssumptions().mfu)
    why = (
        f"ZeRO-3 moves {moved:g} x {gigabytes(weights)} while {training.tokens_per_microbatch:,} tokens are computed "
        f"in {seconds:.2g} s"
    )
    return BandwidthNeed(min(most, moved * weights / seconds / GB), training.workers, why)


def _weights_moved(config: RunConfig) -> float:
    """How many times as many bytes as the weights have go from node to node in a pass with ZeRO-3.

    The weights are gathered twice and the gradients reduced once (arXiv 1910.02054, section 7). With LoRA there are few
    gradients. With hpZ the second gather stays inside a node, and quantized weights have half of the bytes (ZeRO++,
    arXiv 2306.10209).
    """
    zero = zero_settings(config)
    gathers = 1 if (zero.get("zero_hpz_partition_size") or 1) > 1 else 2
    return gathers * (0.5 if zero.get("zero_quantized_weights") else 1) + (config.lora is None)


def zero_settings(config: RunConfig) -> dict[str, Any]:
    """What the config passes to DeepSpeed's section `zero_optimization`."""
    section = config.training.deepspeed.get("zero_optimization")
    return section if isinstance(section, dict) else {}


def all_reduces(facts: ClusterFacts) -> Iterator[Finding]:
    """The findings of every all-reduce that was tried."""
    for result in facts.pings:
        yield from _all_reduce(result, facts)


def rdma(facts: ClusterFacts) -> Iterator[Finding]:
    """Whether the GPU nodes can use their RDMA adapters. It is checked only if there are several such nodes."""
    nodes = [node for node in facts.nodes if node.gpus]
    if len(nodes) < 2:
        return
    for node in nodes:
        devices = f"{len(node.rdma)} RDMA devices"
        if not node.rdma:
            with_devices = [other.name for other in nodes if other.rdma]
            yield Finding(
                "rdma", node.name, "fail" if with_devices else "warn",
                "no RDMA device" + (f", unlike {', '.join(with_devices)}" if with_devices else ""),
                "Give the machine EFA or InfiniBand adapters and pass /dev/infiniband to the container; without them "
                "NCCL uses TCP (see docs/clusters.md, Network).",
            )  # fmt: skip
        elif node.memlock_bytes is not None and node.memlock_bytes < MEMLOCK:
            yield Finding(
                "rdma", node.name, "fail", f"{devices}, and a process may lock only {node.memlock_bytes >> 20} MiB",
                "Start the container with --ulimit memlock=-1, or give the pod the capability IPC_LOCK.",
            )  # fmt: skip
        else:
            yield Finding("rdma", node.name, "ok", devices)


def _all_reduce(result: AllReduceFacts, facts: ClusterFacts) -> Iterator[Finding]:
    cure = f"If nodes have several network interfaces, {_INTERFACES}."
    for name in result.absent:
        yield Finding(result.backend, name, "fail", "did not join the all-reduce over all nodes in time", cure)
    if result.absent:
        return  # the errors of the others only say that they waited for these nodes
    for name, error in result.errors.items():
        yield Finding(result.backend, name, "fail", error, cure)
    if result.seconds is None:
        if not result.errors:
            yield Finding(
                result.backend, CLUSTER, "warn", "not tested: some nodes have no free GPU",
                "Run `aft-ray doctor` again when every node has one.",
            )  # fmt: skip
        return
    yield _bandwidth(result, facts)


def _bandwidth(result: AllReduceFacts, facts: ClusterFacts) -> Finding:
    speed = result.bus_bandwidth
    message = (
        f"{result.bytes >> 20} MiB over {result.ranks} processes in {result.seconds or 0:.4f} s, "
        f"first one after {result.met_s or 0:.1f} s"
    )
    if speed is None:
        return Finding(result.backend, CLUSTER, "ok", message)
    message = f"{speed:.3g} GB/s of bus bandwidth ({message})"
    need = facts.bandwidth_needed
    if result.backend == "nccl" and need is not None and _spans_nodes(need, facts.nodes) and speed < need.gb_s:
        message += f"; training on {need.workers} workers needs {need.gb_s:.3g} GB/s, because {need.why}"
        gpus = sum(int(node.gpus_announced) for node in facts.nodes)
        if result.ranks < gpus:  # each GPU may have adapters of its own, which were idle
            cure = f"Only {result.ranks} of {gpus} GPUs took part: run `aft-ray doctor` again when no GPU is in use."
            return Finding(result.backend, CLUSTER, "warn", message, cure)
        return Finding(result.backend, CLUSTER, "fail", message, _slow_cure(facts.nodes, need))
    if speed < SLOW_GB_S:
        cure = f"Look for a slow link or a wrong network interface: {_INTERFACES}."
        return Finding(result.backend, CLUSTER, "warn", message, cure)
    return Finding(result.backend, CLUSTER, "ok", message)


def _spans_nodes(need: BandwidthNeed, nodes: Sequence[NodeFacts]) -> bool:
    """Whether no node has as many GPUs as there are workers."""
    return need.workers > max((node.gpus_announced for node in nodes), default=0)


def _slow_cure(nodes: Sequence[NodeFacts], need: BandwidthNeed) -> str:
    fewer = (
        "or train with fewer bytes between nodes: workers in one node, lora, a larger training.tokens_per_microbatch, "
        "or training.deepspeed.zero_optimization.zero_hpz_partition_size=8 (docs/scale.md)"
    )
    if without := [node.name for node in nodes if node.gpus and not node.rdma]:
        return (
            f"There is no RDMA device on {', '.join(without)}, so NCCL used TCP: give the machines EFA or InfiniBand "
            f"and pass /dev/infiniband to the containers (docs/clusters.md, Network), {fewer}."
        )
    return (
        f"NCCL_DEBUG=INFO shows whether NCCL uses its RDMA plugin (NET/OFI or NET/IB) or TCP (NET/Socket): install the "
        f"plugin in the image (docs/clusters.md, Network), {fewer}."
    )
