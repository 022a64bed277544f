"""What a cluster is made of: nodes of one kind, by a preset or a YAML file.

Units: memory in GB of 10^9 bytes as a process sees it, bandwidths in GB/s in one direction, of a GPU unless a
description says of a node. Figures of the presets are the makers' (data sheets of A100, H100 and H200; AWS p4d, p4de,
p5 and p5en for CPUs, host memory and network), peaks without sparsity; what is reached of them is an assumption.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from aft_ray.config.loader import parse_section, read_tree
from aft_ray.config.run import ConfigError
from aft_ray.config.section import Natural, Positive, Section

GB = 1e9


class NodeType(Section):
    """One machine."""

    name: str = Field(description="what to call it")
    gpus: Natural = Field(description="GPUs")
    cpus: Positive = Field(description="CPUs that Ray counts")
    host_memory: float = Field(gt=0, description="host memory, GB")
    gpu_memory: float = Field(0, ge=0, description="memory of a GPU, GB")
    gpu_tflops: float = Field(0, ge=0, description="bfloat16 TFLOP/s of a GPU, dense")
    gpu_bandwidth: float = Field(0, ge=0, description="memory bandwidth of a GPU, GB/s")
    nvlink: float = Field(0, ge=0, description="a GPU to the others of its node, GB/s; 0: over PCIe")
    pcie: float = Field(25, gt=0, description="a GPU to host memory, GB/s")
    network: float = Field(gt=0, description="node to node, all adapters together, GB/s")
    storage: float = Field(gt=0, description="node to shared storage, GB/s")
    host_bandwidth: float = Field(200, gt=0, description="host memory, GB/s")
    cpu_gflops: float = Field(50, gt=0, description="GFLOP/s of a CPU, for runs without GPUs")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        for key in ("gpu_memory", "gpu_tflops", "gpu_bandwidth"):
            if self.gpus and not getattr(self, key):
                raise ConfigError(f"the node {self.name} has {self.gpus} GPUs, so it needs {key}")
        return self

    @property
    def between_gpus(self) -> float:
        """GB/s of a GPU to another of its node."""
        return self.nvlink or self.pcie


@dataclass(frozen=True, slots=True)
class ClusterShape:
    """So many nodes of a kind."""

    node: NodeType
    nodes: int

    @property
    def gpus(self) -> int:
        return self.nodes * self.node.gpus

    @property
    def cpus(self) -> int:
        return self.nodes * self.node.cpus

    def __str__(self) -> str:
        return f"{self.nodes} x {self.node.name}"


@dataclass(frozen=True, slots=True)
class Device:
    """What one process computes on: a GPU, or the CPUs it reserves. memory in bytes, flops a second, bandwidth bytes/s.

    memory is None on the CPU, where processes share their node's.
    """

    memory: float | None
    flops: float
    bandwidth: float


def device(node: NodeType, gpus: float, cpus: float) -> Device:
    """The device of a process that reserves so many GPUs (a share of one, or 0) and CPUs."""
    if gpus:
        return Device(min(gpus, 1) * node.gpu_memory * GB, node.gpu_tflops * 1e12, node.gpu_bandwidth * GB)
    share = min(1.0, cpus / node.cpus)
    return Device(None, cpus * node.cpu_gflops * 1e9, share * node.host_bandwidth * GB)


_MIB = 2**20 / GB
NODES = {
    node.name: node
    for node in (
        NodeType(
            name="a100-40gb", gpus=8, cpus=96, host_memory=1237, gpu_memory=40_960 * _MIB, gpu_tflops=312,
            gpu_bandwidth=1555, nvlink=300, pcie=25, network=50, storage=5,
        ),
        NodeType(
            name="a100-80gb", gpus=8, cpus=96, host_memory=1237, gpu_memory=81_920 * _MIB, gpu_tflops=312,
            gpu_bandwidth=2039, nvlink=300, pcie=25, network=50, storage=5,
        ),
        NodeType(
            name="h100-80gb", gpus=8, cpus=192, host_memory=2199, gpu_memory=81_559 * _MIB, gpu_tflops=989,
            gpu_bandwidth=3350, nvlink=450, pcie=50, network=400, storage=10, host_bandwidth=400,
        ),
        NodeType(
            name="h200-141gb", gpus=8, cpus=192, host_memory=2199, gpu_memory=143_771 * _MIB, gpu_tflops=989,
            gpu_bandwidth=4800, nvlink=450, pcie=50, network=400, storage=10, host_bandwidth=400,
        ),
        NodeType(
            name="cpu", gpus=0, cpus=8, host_memory=34, network=1, storage=1, pcie=10, host_bandwidth=40,
        ),
    )
}  # fmt: skip


def load_node(name: str) -> NodeType:
    """A preset by its name, or the YAML file at a path. Raises ConfigError."""
    if name in NODES:
        return NODES[name]
    if Path(name).suffix in {".yaml", ".yml"}:
        return parse_section(NodeType, {"name": Path(name).stem, **read_tree(name)})
    raise ConfigError(f"--node={name} is none of {', '.join(NODES)}, and no .yaml file that describes a node")
