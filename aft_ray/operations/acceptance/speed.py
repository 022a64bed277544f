"""Acceptance checks of training at the size of real models: peak memory against `aft-ray plan`, tokens/s and MFU.

The groups of a step fill the limits of the config exactly, as the plan assumes: every row has `model.max_length`
tokens, and a step is one micro-batch of `training.tokens_per_microbatch` tokens. So the plan must be met, not only
kept.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aft_ray.config.run import RunConfig, parse_config
from aft_ray.operations.acceptance.machine import host_memory, node_of_card
from aft_ray.operations.acceptance.models import GroupShape, random_groups, write_random_model
from aft_ray.operations.acceptance.outcome import Figure, Skipped
from aft_ray.operations.acceptance.training import SMALL_MODEL, process_group
from aft_ray.planning.plan.architecture import PRESETS, Architecture
from aft_ray.planning.plan.assumptions import PlanAssumptions
from aft_ray.planning.plan.quantities import GB, giga
from aft_ray.planning.plan.training_memory import TrainingMemory, training_memory
from aft_ray.planning.plan.workload import workload

# The largest share by which the peak memory may differ from the plan's.
MEMORY_LIMIT = 0.10
_WARM_UP, _STEPS = 2, 5
# The ways to train a model on one GPU, the fastest first: the first that the plan says fits is taken.
_WAYS: Mapping[str, Mapping[str, Any]] = {
    "ZeRO-3": {"training": {"zero_stage": 3}},
    "ZeRO-3, activation checkpointing": {"training": {"zero_stage": 3, "activation_checkpointing": "full"}},
    "ZeRO-3, activation checkpointing, offloaded optimizer": {
        "training": {"zero_stage": 3, "activation_checkpointing": "full", "offload_optimizer": True}
    },
    "LoRA of rank 16, ZeRO-3, activation checkpointing": {
        "training": {"zero_stage": 3, "activation_checkpointing": "full"},
        "lora": {"rank": 16},
    },
}


def train_1b(small: bool) -> list[Figure]:
    """Training of Llama-3.2-1B with random weights; in the small form, of a tiny model."""
    return _measure(SMALL_MODEL if small else PRESETS["meta-llama/llama-3.2-1b"], small)


def train_7b(small: bool) -> list[Figure]:
    """Training of Llama-2-7B with random weights."""
    if small:
        raise Skipped("it has no small form; train-1b has one")
    return _measure(PRESETS["meta-llama/llama-2-7b-hf"], small)


def model_flops(model: Architecture, row: int, response: int, trained: bool) -> float:
    """FLOPs that training needs for a token of a row, without any that are computed again.

    A forward pass takes 2 FLOPs for each parameter of the layers, 4 x layers x width x row for attention (PaLM, arXiv
    2204.02311, appendix B), and 2 for each parameter of the output layer, through which only responses pass. A backward
    pass takes twice as much, or as much where the weights are frozen (LoRA).

    Args:
        row: tokens of a row.
        response: those of them that belong to the response.
        trained: whether the weights are trained, and not adapters.
    """
    forward: float = 2 * model.body_parameters + 4 * model.layers * model.query_width * row
    forward += 2 * model.embedding_parameters * response / row
    return forward * (3 if trained else 2)


def mfu(flops: float, tokens_per_s: float, peak: float) -> float:
    """Model FLOP/s utilisation: FLOPs of a token (`model_flops`) x tokens/s / the card's peak FLOP/s in bfloat16."""
    return flops * tokens_per_s / peak


def _measure(model: Architecture, small: bool) -> list[Figure]:
    import torch

    gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory(prefix="aft_ray-acceptance-") as place:
        needed = 2.2 * model.parameters
        if (free := shutil.disk_usage(place).free) < needed:
            raise Skipped(
                f"{place} has {free / GB:.0f} GB free and the random weights take {needed / GB:.0f} GB; set TMPDIR"
            )
        way, config, expected = _fitting_way(model, Path(place) / "model", gpu, small)
        directory = write_random_model(Path(place) / "model", model, "cuda" if gpu else "cpu")
        if gpu:
            torch.cuda.empty_cache()
        with process_group():
            seconds, tokens = _run_steps(directory, config, model)
    rate = tokens / seconds
    figures = [Figure("model", f"{giga(model.parameters)} parameters, {way}")]
    figures.append(_memory_figure(expected, gpu))
    figures.append(Figure("speed", rate, "tokens/s"))
    return figures + _mfu_figures(config, model, rate, gpu)


def _fitting_way(model: Architecture, directory: Path, gpu: bool, small: bool) -> tuple[str, RunConfig, TrainingMemory]:
    """The first of the ways to train the model that fits this machine, its config and its planned memory."""
    import torch

    for way, sections in _WAYS.items():
        config = _config(directory, sections, gpu, small)
        work = workload(config, _assumptions(config))
        planned = training_memory(config, model, work, _assumptions(config), workers=1)
        if not gpu:
            return way, config, planned
        # The caching allocator cannot use the last percents, which other processes and CUDA itself take.
        card = torch.cuda.get_device_properties(0).total_memory * 0.97
        if planned.device <= card and planned.host <= host_memory() * 0.9:
            return way, config, planned
    raise Skipped(
        f"the plan needs {planned.device / GB:.0f} GB on the GPU even with LoRA, and this one has {card / GB:.0f}"
    )


def _config(directory: Path, sections: Mapping[str, Any], gpu: bool, small: bool) -> RunConfig:
    longest, k = (64, 3) if small else (768, 3)
    response = longest * 2 // 3
    group = longest - response + (1 + k) * (response - 1)  # the last token of a response is not computed
    return parse_config(
        {
            "run_dir": str(directory.parent),
            "model": {"name": str(directory), "dtype": "bfloat16", "max_length": longest},
            "sampling": {"k": k, "max_tokens": response},
            **sections,
            "training": {
                "gpus_per_worker": int(gpu),
                "groups_per_step": 2,
                "tokens_per_microbatch": 2 * group,
                **sections["training"],
            },
        }
    )


def _assumptions(config: RunConfig) -> PlanAssumptions:
    """Every prompt and response is as long as the config allows, which is how the groups are made."""
    response = config.sampling.max_tokens
    return PlanAssumptions(
        questions=2, prompt_tokens=config.model.max_length - response, response_tokens=response, signal=1, distinct=1
    )


def _run_steps(directory: Path, config: RunConfig, model: Architecture) -> tuple[float, int]:
    """The seconds of a step, and its tokens. The peak memory is counted from the end of loading."""
    import torch

    from aft_ray.objectives import build_objective
    from aft_ray.training.batch import make_batch
    from aft_ray.training.batching import group_size, plan_step
    from aft_ray.training.deepspeed import build_engine
    from aft_ray.training.step import train_step

    gpu, response = torch.cuda.is_available(), config.sampling.max_tokens
    prompt = config.model.max_length - response
    shape = GroupShape(config.training.groups_per_step, config.sampling.k, (prompt, prompt), (response, response))
    objective = build_objective("aft_boundary")
    groups = random_groups(shape, model.vocabulary)
    sizes = [group_size(group, objective) for group in groups]
    plan = plan_step(sizes, ranks=1, budget=config.training.tokens_per_microbatch)
    batches = [make_batch([groups[i] for i in planned.groups], planned, objective) for planned in plan.shares[0]]
    engine = build_engine(directory, config.model, config.training, lora=config.lora)
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    seconds = 0.0
    for number in range(_WARM_UP + _STEPS):
        started = time.monotonic()
        stats = train_step(engine, batches, plan, objective, 1.0, config.training.learning_rate)
        if gpu:
            torch.cuda.synchronize()
        if number >= _WARM_UP:
            seconds += time.monotonic() - started
    return seconds / _STEPS, stats.tokens


def allocated_bytes(planned: TrainingMemory) -> float:
    """The part of a worker's planned memory that torch's allocator counts: all but the reserve."""
    return planned.device - sum(line.value for line in planned.lines if "training_reserve" in line.how)


def _memory_figure(planned: TrainingMemory, gpu: bool) -> Figure:
    """The peak of torch's allocator. The plan's reserve for CUDA, NCCL and fragmentation lies outside of it."""
    import torch

    if not gpu:
        return Figure("peak memory", "not measured: torch counts it on GPUs only")
    expected, peak = allocated_bytes(planned), torch.cuda.max_memory_allocated()
    name = f"peak memory {peak / GB:.1f} GB, planned {expected / GB:.1f} GB, off by"
    return Figure(name, peak / expected - 1, limit=MEMORY_LIMIT)


def _mfu_figures(config: RunConfig, model: Architecture, rate: float, gpu: bool) -> list[Figure]:
    import torch

    if not gpu:
        return [Figure("MFU", "not given: a CPU has no peak speed in the presets")]
    card = torch.cuda.get_device_name(0)
    node = node_of_card(card)
    if node is None:
        return [Figure("MFU", f"not given: the peak speed of {card} is in no preset")]
    flops = model_flops(model, config.model.max_length, config.sampling.max_tokens, config.lora is None)
    used = mfu(flops, rate, node.gpu_tflops * 1e12)
    # `aft-ray plan` counts the forward pass that activation checkpointing repeats.
    passes = 2 if config.lora is not None else 3
    planned = used * (passes + (config.training.activation_checkpointing == "full")) / passes
    return [Figure("MFU", used), Figure("for the plan: --assume mfu=", planned)]
