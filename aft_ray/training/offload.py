"""The train workers' end of taking turns with engines on their GPUs (`sampling.colocate`).

Invariant: between `leave` and `reload` a worker's weights, gradients and optimizer states are in CPU memory.
"""

from __future__ import annotations

from typing import Any

import ray
import torch

from aft_ray.cluster.colocated_placement import WorkerPlacement


def seat(rank: int, workers: int) -> WorkerPlacement:
    """Where this worker sits."""
    context = ray.get_runtime_context()
    gpus = context.get_accelerator_ids().get("GPU", [])
    return WorkerPlacement(rank, workers, context.get_node_id(), tuple(map(str, gpus)))


def leave(engine: Any) -> None:
    """Moves a DeepSpeed engine's states to CPU memory; those that it keeps there anyway stay where they are."""
    if not engine.zero_offload_param():
        engine.offload_states(pin_memory=engine.device.type == "cuda")
    if engine.device.type == "cuda":
        torch.cuda.empty_cache()


def reload(engine: Any) -> None:
    """Moves them back, before anything is computed with them."""
    if not engine.zero_offload_param():
        engine.reload_states()
