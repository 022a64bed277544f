"""Acceptance checks of the training step: bfloat16 on the GPU against float32 on the CPU.

They use `training.step`, `training.deepspeed` and `training.batch` as a run does, with one rank. Neither Ray nor vLLM
is imported.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from aft_ray.config.run import parse_config
from aft_ray.operations.acceptance.models import GroupShape, random_groups, write_random_model
from aft_ray.operations.acceptance.outcome import Figure
from aft_ray.planning.plan.architecture import Architecture

if TYPE_CHECKING:  # it imports torch, and the list of checks is made without
    from aft_ray.operations.acceptance.reference import Steps, Work

SMALL_MODEL = Architecture("random", "llama", layers=2, hidden=64, intermediate=128, heads=1, kv_heads=1, vocabulary=64,
                           context=64, head_size=64)  # fmt: skip
MODEL = Architecture("random", "llama", layers=4, hidden=1024, intermediate=2816, heads=16, kv_heads=4, vocabulary=8192,
                     context=192, head_size=64)  # fmt: skip
SMALL_GROUPS = GroupShape(8, 4, (2, 12), (2, 10))
GROUPS = GroupShape(8, 4, (32, 96), (16, 64))
# Large enough that a step shows in a bfloat16 weight, and that rounding in float32 does not show in a step.
_LEARNING_RATE = 1e-3
_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def plain_step(small: bool) -> list[Figure]:
    """Two steps in bfloat16 on the GPU, without DeepSpeed: loss, gradients, and torch's AdamW on bfloat16 weights."""
    from aft_ray.operations.acceptance.reference import compare, torch_steps

    with _work(small, zero_stage=0) as work:
        return compare(torch_steps(work, "bfloat16", _device()), torch_steps(work))


def zero_step(small: bool, **training: Any) -> list[Figure]:
    """Two optimiser steps of DeepSpeed in bfloat16 with these keys of `training`, against float32."""
    from aft_ray.operations.acceptance.reference import torch_steps
    from aft_ray.training.deepspeed import build_engine

    with _work(small, **training) as work, process_group():
        engine = build_engine(work.directory, work.config.model, work.config.training)
        return _two_steps(engine, work, torch_steps(work))


def lora_step(small: bool, **training: Any) -> list[Figure]:
    """Two optimiser steps of DeepSpeed on adapters whose matrices are both random, against float32."""
    from aft_ray.operations.acceptance.reference import torch_steps
    from aft_ray.training.deepspeed import build_engine

    with _work(small, lora={"rank": 8, "targets": _TARGETS}, **training) as work, process_group():
        config, adapter = work.config, _write_adapter(work)
        engine = build_engine(work.directory, config.model, config.training, lora=config.lora, adapter=adapter)
        return _two_steps(engine, work, torch_steps(work, adapter=adapter))


def _two_steps(engine: Any, work: Work, expected: Steps) -> list[Figure]:
    """Takes two steps and compares: with float32, and the first with AdamW's formula on the engine's own gradient."""
    import torch
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    from aft_ray.operations.acceptance.reference import BETA1, STEP_LIMIT, Steps, adamw_step, compare
    from aft_ray.training.deepspeed import gathered
    from aft_ray.training.step import train_step

    training = work.config.training
    trained = {name: one for name, one in engine.module.named_parameters() if one.requires_grad}
    before = {name: safe_get_full_fp32_param(one).float().cpu().clone() for name, one in trained.items()}

    def step() -> Any:
        return train_step(engine, work.batches, work.plan, work.objective, 1.0, training.learning_rate)

    first = step()
    gradients, wrong_step, unrounded = {}, 0.0, 0
    for name, parameter in trained.items():
        # After one step the first moment is (1 - beta1) times the gradient that the optimizer was given.
        moment = safe_get_full_optimizer_state(parameter, "exp_avg").float().cpu()
        gradients[name] = (moment / (1 - BETA1)).view(before[name].shape)
        master = safe_get_full_fp32_param(parameter).float().cpu().view(before[name].shape)
        error = (master - adamw_step(before[name], gradients[name], training)).abs().max() / training.learning_rate
        wrong_step = max(wrong_step, float(error))
        with gathered([parameter]), torch.no_grad():
            unrounded += int((parameter.detach().cpu() != master.to(parameter.dtype)).sum())
    second = step()
    seen = Steps((first.loss, second.loss), first.grad_norm, gradients)
    return [
        *compare(seen, expected),
        Figure("step off AdamW's by", wrong_step, "learning rates", STEP_LIMIT),
        Figure("weights that are not their rounded float32 copies", unrounded, limit=0),
    ]


@contextlib.contextmanager
def _work(small: bool, lora: dict[str, Any] | None = None, **training: Any) -> Iterator[Work]:
    from aft_ray.objectives import build_objective
    from aft_ray.operations.acceptance.reference import Work
    from aft_ray.training.batch import make_batch
    from aft_ray.training.batching import group_size, plan_step

    model, shape = (SMALL_MODEL, SMALL_GROUPS) if small else (MODEL, GROUPS)
    objective = build_objective("aft_boundary")
    groups = random_groups(shape, model.vocabulary)
    sizes = [group_size(group, objective) for group in groups]
    plan = plan_step(sizes, ranks=1, budget=sum(one.prompt + one.supervised_tokens for one in sizes) // 3)
    with TemporaryDirectory(prefix="aft_ray-acceptance-") as place:
        # Wider weights than a new model has: its scores differ from token to token, as those of a trained one do.
        directory = write_random_model(Path(place) / "model", model, _device(), spread=0.1 if small else 0.04)
        config = parse_config(
            {
                "run_dir": place,
                "model": {"name": str(directory), "dtype": "bfloat16", "max_length": model.context},
                "sampling": {"max_tokens": model.context // 2},
                "training": {"learning_rate": _LEARNING_RATE, "gpus_per_worker": int(_device() == "cuda"), **training},
                **({"lora": lora} if lora else {}),
            }
        )
        batches = [make_batch([groups[i] for i in planned.groups], planned, objective) for planned in plan.shares[0]]
        yield Work(directory, config, objective, batches, plan)


def _write_adapter(work: Work) -> Path:
    """An adapter directory with random bfloat16 numbers in both matrices. New adapters have zeros in the second."""
    import torch
    from safetensors.torch import save_file

    from aft_ray.training.model.loading import load_model
    from aft_ray.training.model.lora import add_adapters
    from aft_ray.weights.adapter import ADAPTER_FILE, is_adapter, stored_name

    assert work.config.lora is not None
    model = load_model(work.directory, "bfloat16")
    add_adapters(model, work.config.lora, str(work.directory))
    torch.manual_seed(1)
    tensors = {
        stored_name(name): (torch.randn(parameter.shape) * 0.05).to(torch.bfloat16)
        for name, parameter in model.named_parameters()
        if is_adapter(name)
    }
    directory = work.directory.parent / "adapter"
    directory.mkdir()
    save_file(tensors, directory / ADAPTER_FILE)
    return directory


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """A process group with this process as its only rank, on the first GPU if there is one.

    A group that exists is used and kept: DeepSpeed cannot be given a second one in the same process.
    """
    import torch.distributed

    dist: Any = torch.distributed  # its stores have no types
    if dist.is_initialized():
        yield
        return
    os.environ.update({"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"})
    dist.init_process_group("nccl" if _device() == "cuda" else "gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
