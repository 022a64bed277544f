"""The machine that the acceptance suite runs on: its cards, its memory, its versions, and the peak speed of a card."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path
from typing import Any

from aft_ray.operations.probe import nvidia_smi, versions
from aft_ray.planning.plan.hardware import NODES, NodeType

# The product names that nvidia-smi and torch give, and the presets of `aft-ray plan` with their peak speeds. A card
# with another name, such as a PCIe variant with lower clocks, has no known peak.
_CARDS = {
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-SXM4-80GB": "a100-80gb",
    "NVIDIA A100 80GB PCIe": "a100-80gb",
    "NVIDIA H100 80GB HBM3": "h100-80gb",
    "NVIDIA H200": "h200-141gb",
}
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def gpu_count() -> int:
    """The GPUs that torch can use here; 0 without torch."""
    try:
        import torch
    except ImportError:
        return 0
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def node_of_card(name: str) -> NodeType | None:
    """The preset of a card; None for a card whose peak speed is not known here."""
    return NODES.get(_CARDS.get(name, ""))


def describe_machine() -> dict[str, str]:
    """The card with its number, and the versions of what is installed, for the line of an outcome."""
    described = {"card": _card()}
    described |= {name: version for name, version in versions().items() if version}
    if rows := nvidia_smi():
        described["driver"] = rows[0]["driver"]
    if gpu_count():
        import torch

        nccl: Any = torch.cuda.nccl  # without types
        described["CUDA"] = str(torch.version.cuda)
        described["NCCL"] = ".".join(map(str, nccl.version()))
    return described


def host_memory() -> int:
    """Bytes of host memory that this process may use: those of the machine, or of the container when it has a limit."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # no limit, or another version of cgroups
        total = min(total, int(_CGROUP_LIMIT.read_text()))
    return total


def _card() -> str:
    if count := gpu_count():
        import torch

        return f"{count} x {torch.cuda.get_device_name(0)}"
    return f"no GPU, {os.cpu_count()} x {_cpu()}"


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
