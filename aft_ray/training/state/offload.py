"""Moves what a train worker has in GPU memory to CPU memory and back, when engines use the same GPU in turn.

DeepSpeed can move states itself, but only of some optimizers and stages, and it leaves buckets behind. Here the memory
of every tensor of the process is moved, whoever holds the tensor: its storage becomes empty, and has the same content
again after `reload`. Tensors that are views of one storage stay views of it.

Invariant: between `offload_states` and `reload` no tensor of this process has memory on the device.
"""

from __future__ import annotations

import gc
import sys
import time
import uuid
from dataclasses import dataclass
from typing import Any

import ray
import torch
import torch.distributed as dist

from aft_ray.cluster.colocated_placement import WorkerPlacement

# Bytes of a piece of host memory. torch rounds page-locked memory up to a power of two, which this is.
_CHUNK = 256 << 20
# Bytes on a GPU that do not matter: what libraries keep for themselves.
_SMALL = 64 << 20
# Seconds that processes of engines have to end after their sampler.
_ROOM_TIMEOUT_S = 30.0


def worker_placement(rank: int, workers: int) -> WorkerPlacement:
    """The node and the GPUs of this worker, from which the driver places the colocated engines. All ranks call it."""
    context = ray.get_runtime_context()
    gpus = context.get_accelerator_ids().get("GPU", [])
    return WorkerPlacement(rank, workers, context.get_node_id(), tuple(map(str, gpus)), _incarnation())


@dataclass(frozen=True, slots=True)
class OffloadedStates:
    """What was moved to CPU memory: for each storage its content, in pieces."""

    device: torch.device
    contents: list[tuple[torch.UntypedStorage, list[torch.Tensor]]]

    def reload(self) -> None:
        """Moves everything back. Must be called once, before the engine computes again."""
        if self.device.type == "cuda":
            _wait_for_room(self.device, sum(len(piece) for _, pieces in self.contents for piece in pieces))
        for storage, pieces in self.contents:
            storage.resize_(sum(piece.numel() for piece in pieces))
            for on_device, piece in zip(_pieces(storage, self.device), pieces, strict=True):
                on_device.copy_(piece, non_blocking=True)
        _synchronize(self.device)


def offload_states(device: torch.device) -> OffloadedStates:
    """Moves the content of every tensor of this process on a device to CPU memory, and frees its memory there.

    No thread may use a tensor on the device meanwhile. On a device "cpu" the content moves to other memory.
    """
    release_memory(device)
    _synchronize(device)
    moved = []
    for storage in storages(device):
        pieces = []
        for piece in _pieces(storage, device):
            # From page-locked memory the GPU copies faster. torch keeps it for the next time.
            host = torch.empty(piece.numel(), dtype=torch.uint8, pin_memory=device.type == "cuda")
            pieces.append(host.copy_(piece, non_blocking=True))
        moved.append((storage, pieces))
    _synchronize(device)
    for storage, _ in moved:
        storage.resize_(0)
    release_memory(device)
    if device.type == "cuda" and (left := torch.cuda.memory_allocated(device)) > _SMALL:
        print(f"{left / 1e9:.2f} GB of training stay in GPU memory while engines use it", file=sys.stderr, flush=True)
    return OffloadedStates(device, moved)


def release_memory(device: torch.device) -> None:
    """Gives the memory of tensors that are gone back to the device, for other processes."""
    gc.collect()  # an engine that is not used any more refers to itself
    if device.type == "cuda":
        torch.cuda.empty_cache()


def storages(device: torch.device) -> list[torch.UntypedStorage]:
    """The storages on a device of all tensors of this process that hold memory of their own."""
    found: dict[int, torch.UntypedStorage] = {}
    for tensor in _tensors():
        if tensor.device.type == device.type and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            # Not resizable is memory that belongs to others, for instance to a mapped file; never so on a GPU.
            if storage.nbytes() and storage.resizable():
                found[storage._cdata] = storage
    return list(found.values())


def _tensors() -> list[torch.Tensor]:
    # The exact types: classes of their own have tensors that a compiler traces, which have no memory. Those of
    # bitsandbytes are packed weights.
    tensors: list[Any] = [
        one
        for one in gc.get_objects()
        if issubclass(type(one), torch.Tensor)
        if type(one) in (torch.Tensor, torch.nn.Parameter) or type(one).__module__.startswith("bitsandbytes.")
    ]
    return tensors + [one.grad for one in tensors if one.is_leaf and one.grad is not None]


def _pieces(storage: torch.UntypedStorage, device: torch.device) -> tuple[torch.Tensor, ...]:
    """The bytes of a storage, in pieces."""
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage).split(_CHUNK)  # type: ignore[call-overload, no-any-return, no-untyped-call]


def _wait_for_room(device: torch.device, needed: int) -> None:
    """Waits while processes of an engine that have been killed end; without room, the reload says so itself."""
    deadline = time.monotonic() + _ROOM_TIMEOUT_S
    while torch.cuda.mem_get_info(device)[0] < needed and time.monotonic() < deadline:
        time.sleep(0.2)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _incarnation() -> str:
    """A name that all train workers which run together share, and no others. All ranks call it together."""
    name = [uuid.uuid4().hex]
    dist.broadcast_object_list(name, src=0)
    return name[0]
