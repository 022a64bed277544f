"""Moves the training state of a worker to CPU memory and back, when engines use the same GPU (`sampling.colocate`).

Invariant: between `offload_states` and `reload_states` no weight, gradient or optimizer state of this worker is in GPU
memory.
"""

from __future__ import annotations

from typing import Any

import ray
import torch

from aft_ray.cluster.colocated_placement import WorkerPlacement


def worker_placement(rank: int, workers: int) -> WorkerPlacement:
    """The node and the GPUs of this worker, from which the driver places the colocated engines."""
    context = ray.get_runtime_context()
    gpus = context.get_accelerator_ids().get("GPU", [])
    return WorkerPlacement(rank, workers, context.get_node_id(), tuple(map(str, gpus)))


def offload_states(engine: Any) -> None:
    """Moves the states of a DeepSpeed engine to CPU memory and frees their GPU memory.

    With `training.offload_parameters` DeepSpeed keeps them in CPU memory anyway, and nothing is moved.
    """
    if not engine.zero_offload_param():
        engine.offload_states(pin_memory=engine.device.type == "cuda")
    if engine.device.type == "cuda":
        torch.cuda.empty_cache()


def reload_states(engine: Any) -> None:
    """Moves the states back to the GPU. Must be called before the engine computes again."""
    if not engine.zero_offload_param():
        engine.reload_states()
