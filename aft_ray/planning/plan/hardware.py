"""The hardware that a plan is made for: nodes of one kind, described by a preset or a YAML file.

Units: memory is in GB of 10^9 bytes, as a process sees it. Bandwidths are in GB/s in one direction, and of one GPU
unless a description says that they are of the node. The presets have the manufacturers' numbers: the data sheets of
A100, H100 and H200, and those of AWS p4d, p4de, p5 and p5en for CPUs, host memory and network. Speeds are peaks without
sparsity; the share of them that is reached is an assumption (`assumptions`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, model_validator

from aft_ray.cluster.placement import Bundle
from aft_ray.config.loader import parse_section, read_yaml
from aft_ray.config.run import ConfigError
from aft_ray.config.section import Natural, Positive, Section
from aft_ray.planning.plan.quantities import GB


class NodeType(Section):
    """One machine of a cluster whose machines are all alike."""

    key_list: ClassVar[str] = "docs/planning.md"

    name: str = Field(description="name of this kind of node")
    gpus: Natural = Field(description="number of GPUs")
    cpus: Positive = Field(description="number of CPUs that Ray counts")
    host_memory: float = Field(gt=0, description="host memory, GB")
    gpu_memory: float = Field(0, ge=0, description="memory of a GPU, GB")
    gpu_tflops: float = Field(0, ge=0, description="bfloat16 TFLOP/s of a GPU, dense")
    gpu_bandwidth: float = Field(0, ge=0, description="memory bandwidth of a GPU, GB/s")
    nvlink: float = Field(0, ge=0, description="from a GPU to the others of its node, GB/s; 0: they are joined by PCIe")
    pcie: float = Field(25, gt=0, description="from a GPU to host memory, GB/s")
    network: float = Field(gt=0, description="from node to node, all adapters together, GB/s")
    storage: float = Field(gt=0, description="from a node to shared storage, GB/s")
    host_bandwidth: float = Field(200, gt=0, description="bandwidth of host memory, GB/s")
    cpu_gflops: float = Field(50, gt=0, description="GFLOP/s of one CPU, for runs without GPUs")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key in ("gpu_memory", "gpu_tflops", "gpu_bandwidth"):
            if self.gpus and not getattr(self, key):
                raise ConfigError(f"the node {self.name} has {self.gpus} GPUs, so it needs {key}")
        return self

    @property
    def resources(self) -> Bundle:
        """What Ray can reserve of the node."""
        return Bundle(self.cpus, self.gpus)

    @property
    def gpu_link(self) -> float:
        """GB/s from a GPU to another GPU of its node."""
        return self.nvlink or self.pcie


@dataclass(frozen=True, slots=True)
class ClusterShape:
    """A number of nodes of one kind."""

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
    """What one process computes on: its GPU, or the CPUs that it reserves.

    Attributes:
        memory: Bytes; None on the CPU, where all processes of a node share its memory.
        flops: FLOP/s at peak.
        bandwidth: Bytes a second between the device and its memory, at peak.
    """

    memory: float | None
    flops: float
    bandwidth: float


def device(node: NodeType, gpus: float, cpus: float) -> Device:
    """The device of a process.

    Args:
        node: The node on which it runs.
        gpus: The GPUs that it reserves: 1 or more for a whole GPU, a share of one GPU, or 0.
        cpus: The CPUs that it reserves; they count only without a GPU.
    """
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
    """The preset of this name, or the node that a YAML file at this path describes.

    Raises:
        ConfigError: There is neither, or the file's description is not valid.
    """
    if name in NODES:
        return NODES[name]
    if Path(name).suffix in {".yaml", ".yml"}:
        return parse_section(NodeType, {"name": Path(name).stem, **read_yaml(name)})
    raise ConfigError(f"--node={name} is none of {', '.join(NODES)}, and no .yaml file that describes a node")
