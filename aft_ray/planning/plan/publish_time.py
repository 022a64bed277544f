"""How long new weights take from the trainer to the engines, by transport, and a training state to shared storage.

Invariant: what the train workers do alone (gathering, the model directory) belongs to training; what the engines wait
for (the transport, loading) stands between two rounds of sampling. The training state is saved while the next round
trains, and belongs to neither. Bytes over bandwidths alone: nothing else is assumed to overlap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from aft_ray.config.run import RunConfig, WeightsConfig
from aft_ray.planning.plan.architecture import Architecture
from aft_ray.planning.plan.assumptions import PlanAssumptions
from aft_ray.planning.plan.hardware import NodeType
from aft_ray.planning.plan.quantities import GB, Quantity, counted, gigabytes

TRANSPORTS: tuple[str, ...] = get_args(WeightsConfig.model_fields["transport"].annotation)


@dataclass(frozen=True, slots=True)
class PublishTime:
    """Seconds. trainer: until the version is offered. engines: from then until the last engine has loaded it.

    saving: of the training state, beside the next round.
    """

    trainer: float
    engines: float
    saving: Quantity
    trainer_lines: tuple[Quantity, ...]
    engine_lines: tuple[Quantity, ...]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes: of the model directory, of the adapter if there is one, of the training state (weights, master, Adam)."""

    weights: float
    adapter: float
    checkpoint: float


def sizes(config: RunConfig, model: Architecture) -> Sizes:
    """What a round writes. LoRA: the state is of the adapter alone."""
    width = 2 if config.model.dtype == "bfloat16" else 4
    adapter = 0
    if config.lora is not None:
        adapter = model.lora_parameters(config.lora.rank, config.lora.targets)
    trained = adapter or model.parameters
    return Sizes(width * model.parameters, width * adapter, (width + 12) * trained)


def publish_time(
    config: RunConfig,
    model: Architecture,
    assumed: PlanAssumptions,
    node: NodeType,
    transport: str,
    workers: int,
    sampler_nodes: int,
    engine_processes: int,
) -> PublishTime:
    """Of one version to engines of `engine_processes` processes on `sampler_nodes` nodes."""
    size = sizes(config, model)
    efficiency, gpu = assumed.link_efficiency, config.training.gpus_per_worker > 0
    worker_nodes = -(-workers // node.gpus) if gpu else 1
    lines = []
    if gpu:
        gathering = size.weights / (node.pcie * GB * efficiency)
        how = f"{gigabytes(size.weights)} / (PCIe {node.pcie:g} GB/s x {efficiency:g})"
        lines.append(Quantity("gathering on rank 0", gathering, "s", how))
    writing = size.weights / (node.storage * GB)
    how = f"{gigabytes(size.weights)} / storage {node.storage:g} GB/s of one node"
    lines.append(Quantity("writing the model directory", writing, "s", how))
    storage = min(worker_nodes * node.storage, assumed.shared_storage)
    how = f"{gigabytes(size.checkpoint)} / storage {storage:g} GB/s of {counted(worker_nodes, 'node')}"
    saving = Quantity(
        "saving the training state", size.checkpoint / (storage * GB), "s", f"{how}, beside the next round"
    )
    moved, bandwidth, how = _transport(size, assumed, node, transport, max(1, sampler_nodes))
    arriving = [Quantity(f"to the engines by {transport}", moved / bandwidth, "s", how)]
    if gpu and transport in {"object_store", "checkpoint"}:
        share = size.weights / engine_processes
        how = f"{gigabytes(share)} a process / (PCIe {node.pcie:g} GB/s x {efficiency:g})"
        arriving.append(Quantity("loading", share / (node.pcie * GB * efficiency), "s", how))
    trainer, engines = (sum(line.value for line in part) for part in (lines, arriving))
    return PublishTime(trainer, engines, saving, tuple(lines), tuple(arriving))


def _transport(
    size: Sizes, assumed: PlanAssumptions, node: NodeType, transport: str, nodes: int
) -> tuple[float, float, str]:
    """Bytes, bytes a second, and the formula."""
    if transport == "nccl":
        rate = (min(node.network, node.between_gpus) if node.gpus else node.network) * assumed.link_efficiency
        return size.weights, rate * GB, f"{gigabytes(size.weights)} broadcast once / {rate:.0f} GB/s"
    if transport == "checkpoint":
        rate = min(nodes * node.storage, assumed.shared_storage)
        return (
            nodes * size.weights,
            rate * GB,
            f"{counted(nodes, 'node')} x {gigabytes(size.weights)} / storage {rate:g} GB/s in all",
        )
    each = size.adapter if transport == "lora" else size.weights
    rate = assumed.object_store
    return (
        nodes * each,
        rate * GB,
        f"{counted(nodes, 'node')} x {gigabytes(each)} / {rate:g} GB/s out of the trainer's node",
    )
