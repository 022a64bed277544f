"""Trains on one rank of DeepSpeed with every kind of optimizer, moving the states away between steps.

Prints `STAGE DTYPE OFFLOAD` and `ok`, or what is wrong. It has a process of its own, because all of a process's tensors
are moved. The "device" is the CPU here: what is moved away must be empty, wherever else its content is.
"""

import gc
import os
import sys
import types
from pathlib import Path

import torch
import torch.distributed as dist
from training_helpers import batches_of, plan, random_groups, write_tiny_llama

from aft_ray.config.run import ModelConfig, TrainingConfig
from aft_ray.objectives import build_objective
from aft_ray.training import deepspeed
from aft_ray.training.state.offload import offload_states
from aft_ray.training.step import train_step

CPU = torch.device("cpu")
KINDS = [
    (0, "float32", False),
    (1, "bfloat16", False),
    (2, "float32", True),
    (2, "bfloat16", False),
    (3, "bfloat16", False),
    (3, "bfloat16", True),
]
PARAMETERS = 40_000  # at least, of the tiny model
OBJECTIVE = build_objective("aft_boundary", beta=0.1)
NO_STATES = (types.ModuleType, type, types.FunctionType, types.BuiltinFunctionType, types.FrameType, str, bytes)


def tensors_of(engine):
    """Every tensor that can be reached from a DeepSpeed engine, through whatever holds it."""
    seen, waiting, tensors = set(), [engine, engine.optimizer, *engine.module.parameters()], []
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, NO_STATES):
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor) and one.device == CPU:
            tensors.append(one)
            if one.is_leaf and one.grad is not None:
                waiting.append(one.grad)
        waiting += gc.get_referents(one)
    return tensors


def train(path, config, dtype, moves):
    """The losses of three steps, and the tensors that were not empty after a move, as strings."""
    torch.manual_seed(0)
    engine = deepspeed.build_engine(path, ModelConfig(name=str(path), dtype=dtype), config)
    for parameter in engine.module.parameters():
        # On a GPU every weight has memory of its own; here some are parts of a mapped file, which cannot be freed.
        if not parameter.untyped_storage().resizable():
            parameter.data = parameter.data.clone()
    losses, left = [], []
    for chosen, step in plan(groups := random_groups(16), OBJECTIVE, ranks=1, budget=40):
        batches = batches_of(groups, chosen, step, 0, OBJECTIVE)
        losses.append(train_step(engine, batches, step, OBJECTIVE, 1.0, 1e-3).loss)
        if moves:
            reachable = tensors_of(engine)
            states = offload_states(CPU)
            left += [f"{tuple(t.shape)} {t.dtype}" for t in reachable if t.untyped_storage().nbytes()]
            states.reload()
            assert sum(t.untyped_storage().nbytes() for t in reachable) > 12 * PARAMETERS
            del states, reachable  # on this "device" the next move would move its copies
    engine.destroy()
    return losses, left


def main(directory) -> None:
    path = write_tiny_llama(Path(directory))
    os.environ |= {"LOCAL_RANK": "0"}
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    for stage, dtype, offload in KINDS:
        config = TrainingConfig(zero_stage=stage, offload_optimizer=offload)
        stays, _ = train(path, config, dtype, moves=False)
        moves, left = train(path, config, dtype, moves=True)
        same = stays == moves and stays[0] != stays[-1]
        print(stage, dtype, offload, "ok" if same and not left else (stays, moves, left[:5]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
