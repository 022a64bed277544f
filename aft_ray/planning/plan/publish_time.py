"""How long a new version takes from the train workers to the engines, by transport, and to storage.

Invariant: what the train workers do alone (the pass that copies the layers to host memory, and with `checkpoint` the
model directory) counts as training; what the engines wait for (the transport, loading) counts as sampling. Otherwise
the model directory, and always the training state, are written while the next round trains, and count as neither.
Every time is bytes divided by a bandwidth, and no two of them overlap, though a broadcast overlaps with the copies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import get_args

from aft_ray.config.run import RunConfig, WeightsConfig
from aft_ray.planning.plan.architecture import Architecture
from aft_ray.planning.plan.assumptions import PlanAssumptions
from aft_ray.planning.plan.hardware import NodeType
from aft_ray.planning.plan.quantities import GB, Quantity, counted, gigabytes

TRANSPORTS: tuple[str, ...] = get_args(WeightsConfig.model_fields["transport"].annotation)


@dataclass(frozen=True, slots=True)
class PublishTime:
    """Seconds of publishing one version.

    Attributes:
        trainer: From the end of training until the version is announced to the engines.
        engines: From then until the last engine has loaded it.
        beside: What is written beside the next round: the model directory and the training state.
        trainer_lines: The parts of `trainer`.
        engine_lines: The parts of `engines`.
    """

    trainer: float
    engines: float
    beside: tuple[Quantity, ...]
    trainer_lines: tuple[Quantity, ...]
    engine_lines: tuple[Quantity, ...]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of what a round writes.

    Attributes:
        weights: The model directory.
        adapter: The LoRA adapter; 0 without one.
        checkpoint: The training state: float32 weights and Adam's moments, and with ZeRO 1 and 2 the weights again.
    """

    weights: float
    adapter: float
    checkpoint: float


def sizes(config: RunConfig, model: Architecture) -> Sizes:
    """The sizes of what a round writes. With LoRA the training state is that of the adapter alone."""
    width = 2 if config.model.dtype == "bfloat16" else 4
    adapter = 0
    if config.lora is not None:
        adapter = model.lora_parameters(config.lora.rank, config.lora.targets)
    trained = adapter or model.parameters
    # As `training/state/scratch.py` counts them: bfloat16 trains at stage 1 or above; stage 3 saves no second weights.
    stage = max(config.training.zero_stage, 1) if width == 2 else config.training.zero_stage
    return Sizes(width * model.parameters, width * adapter, (12 + (width if stage in {1, 2} else 0)) * trained)


def publish_time(
    config: RunConfig,
    model: Architecture,
    assumptions: PlanAssumptions,
    node: NodeType,
    transport: str,
    workers: int,
    sampler_nodes: int,
    engine_processes: int,
) -> PublishTime:
    """The time of publishing one version.

    Args:
        config: The run.
        model: Its model.
        assumptions: What the plan assumes.
        node: The kind of node.
        transport: One of `TRANSPORTS`.
        workers: The number of train workers.
        sampler_nodes: The number of nodes with samplers.
        engine_processes: The number of processes of one engine.
    """
    size = sizes(config, model)
    efficiency, gpu = assumptions.link_efficiency, config.training.gpus_per_worker > 0
    worker_nodes = -(-workers // node.gpus) if gpu else 1
    # One layer is copied after the other, each by its owner.
    if gpu:
        rate, copied = node.pcie * GB * efficiency, f"(PCIe {node.pcie:g} GB/s x {efficiency:g})"
    else:
        rate, copied = node.host_bandwidth * GB, f"{node.host_bandwidth:g} GB/s"
    copying = f"{gigabytes(size.weights)} / {copied}, layer by layer"
    lines = [Quantity("copying to host memory", size.weights / rate, "s", copying)]
    storage = min(worker_nodes * node.storage, assumptions.shared_storage)
    of_nodes = f"storage {storage:g} GB/s of {counted(worker_nodes, 'node')}"
    directory = Quantity(
        "writing the model directory", size.weights / (storage * GB), "s", f"{gigabytes(size.weights)} / {of_nodes}"
    )
    state = Quantity(
        "saving the training state", size.checkpoint / (storage * GB), "s", f"{gigabytes(size.checkpoint)} / {of_nodes}"
    )
    beside = [state]
    if transport == "checkpoint" and config.needs_samplers:
        lines.append(directory)
    else:
        beside.insert(0, directory)
    beside = [replace(one, how=f"{one.how}, beside the next round") for one in beside]
    moved, bandwidth, how = _transport(size, assumptions, node, transport, max(1, sampler_nodes), worker_nodes)
    arriving = [Quantity(f"to the engines by {transport}", moved / bandwidth, "s", how)]
    if gpu and transport in {"object_store", "checkpoint"}:
        share = size.weights / engine_processes
        how = f"{gigabytes(share)} a process / (PCIe {node.pcie:g} GB/s x {efficiency:g})"
        arriving.append(Quantity("loading", share / (node.pcie * GB * efficiency), "s", how))
    trainer, engines = (sum(line.value for line in part) for part in (lines, arriving))
    return PublishTime(trainer, engines, tuple(beside), tuple(lines), tuple(arriving))


def _transport(
    size: Sizes, assumptions: PlanAssumptions, node: NodeType, transport: str, nodes: int, worker_nodes: int
) -> tuple[float, float, str]:
    """The bytes that are moved, the bandwidth in bytes a second, and the formula."""
    if transport == "nccl":
        rate = (min(node.network, node.gpu_link) if node.gpus else node.network) * assumptions.link_efficiency
        return size.weights, rate * GB, f"{gigabytes(size.weights)} broadcast once / {rate:.0f} GB/s"
    if transport == "checkpoint":
        rate = min(nodes * node.storage, assumptions.shared_storage)
        return (
            nodes * size.weights,
            rate * GB,
            f"{counted(nodes, 'node')} x {gigabytes(size.weights)} / storage {rate:g} GB/s in all",
        )
    # Worker 0 has the adapter; every worker has the layers that it owns.
    each, sources = (size.adapter, 1) if transport == "lora" else (size.weights, worker_nodes)
    rate = sources * assumptions.object_store
    how = f"{counted(nodes, 'node')} x {gigabytes(each)} / {rate:g} GB/s out of {counted(sources, 'trainer node')}"
    return nodes * each, rate * GB, how
