"""The DeepSpeed engine: its configuration, its optimizer, and its checkpoints.

Invariants: one config field picks the ZeRO stage and nothing else changes; DeepSpeed writes nothing to stdout. The
default process group exists already when an engine is built.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from aft_ray.config.run import LoraConfig, ModelConfig, TrainingConfig
from aft_ray.training.loading import LoadingError, load_model
from aft_ray.training.lora import add_adapters, load_adapter

_TAG = "state"
_BUCKET = 50_000_000  # elements; DeepSpeed's default of 5e8 takes gigabytes of buffers on any rank


def ds_config(training: TrainingConfig, dtype: str) -> dict[str, Any]:
    """DeepSpeed's configuration. dtype: "float32" or "bfloat16".

    One accumulation step: the trainer marks the last micro-batch of each optimiser step itself, as their number varies.
    """
    bfloat16 = dtype == "bfloat16"
    # Without ZeRO, DeepSpeed accumulates bfloat16 gradients in bfloat16; stage 1 is the same step in float32.
    stage = max(training.zero_stage, 1) if bfloat16 else training.zero_stage
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": _BUCKET,
        "allgather_bucket_size": _BUCKET,
        "stage3_prefetch_bucket_size": _BUCKET,
    }
    gpu = torch.cuda.is_available()
    if not gpu:
        zero["overlap_comm"] = False
    in_cpu_memory = {"device": "cpu", "pin_memory": gpu}
    if training.offload_optimizer:
        zero["offload_optimizer"] = in_cpu_memory
    if training.offload_parameters:
        zero["offload_param"] = in_cpu_memory
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": training.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        "bf16": {"enabled": bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": None,
    }


def build_engine(
    path: str | Path,
    model: ModelConfig,
    training: TrainingConfig,
    *,
    lora: LoraConfig | None = None,
    adapter: Path | None = None,
    universal: bool = False,
) -> Any:
    """A DeepSpeed engine with AdamW on the model at `path`. All ranks call it together.

    lora: train adapters instead of the weights. adapter: the directory that they begin from; None: from nothing.
    universal: `load` will be given a checkpoint that `to_universal` has written.
    """
    deepspeed = _import_deepspeed()
    config = ds_config(training, model.dtype) | {"checkpoint": {"load_universal": universal}}
    module = load_model(path, model.dtype, trust_remote_code=model.trust_remote_code, config=config)
    if lora is not None:
        add_adapters(module, lora, str(path))
    if adapter is not None:
        load_adapter(module, adapter)
    if training.activation_checkpointing:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with contextlib.redirect_stdout(sys.stderr):  # it prints that its operations are built
        optimizer = _optimizer([p for p in module.parameters() if p.requires_grad], training)
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    return engine


def _optimizer(parameters: list[torch.nn.Parameter], training: TrainingConfig) -> Any:
    """AdamW: torch's own, or DeepSpeed's for states in CPU memory, built in C++ when it is first used."""
    if not training.offload_optimizer:
        return torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=training.weight_decay)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(parameters, lr=training.learning_rate, weight_decay=training.weight_decay)


def save(engine: Any, directory: str | Path, client_state: dict[str, Any]) -> None:
    """Writes this rank's shards of what is trained and of the optimizer. All ranks call it together."""
    engine.save_checkpoint(
        str(directory), tag=_TAG, client_state=client_state, save_latest=False, exclude_frozen_parameters=True
    )


def load(engine: Any, directory: str | Path) -> dict[str, Any]:
    """Restores weights and optimizer; the client state that was saved. Raises FileNotFoundError without a checkpoint.

    DeepSpeed unpickles what it reads: only ever give it a checkpoint that this run wrote itself.
    """
    optimizer = engine.basic_optimizer
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    # What is frozen was not saved: it is as it was built.
    whole = all(parameter.requires_grad for parameter in engine.module.parameters())
    path, client_state = engine.load_checkpoint(
        str(directory), tag=_TAG, load_module_strict=whole, load_lr_scheduler_states=False
    )
    if path is None:
        raise FileNotFoundError(f"no DeepSpeed checkpoint in {directory}")
    # The two AdamWs know other settings, and count steps in other types: what was saved may be the other one's.
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group |= own
    for state in optimizer.state.values():
        if "step" in state:
            steps = float(state["step"])
            state["step"] = torch.tensor(steps) if isinstance(optimizer, torch.optim.AdamW) else int(steps)
    return dict(client_state)


def saved_by(directory: str | Path) -> int | None:
    """How many ranks saved a checkpoint together; None without ZeRO, whose state any number of ranks can load."""
    return len(list((Path(directory) / _TAG).glob("*_optim_states.pt"))) or None


def to_universal(directory: str | Path, output: str | Path, timeout_s: float) -> None:
    """Writes a checkpoint again, by parameters instead of by ranks, so that any number of ranks can load it.

    In a process of its own, which gives its memory back. Raises LoadingError.
    """
    arguments = ["--input_folder", str(Path(directory) / _TAG), "--output_folder", str(Path(output) / _TAG)]
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *arguments, "--inject_missing_state"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise LoadingError(
            f"{directory} was not converted for another number of workers in training.timeout_s={timeout_s:.0f} s"
        ) from None
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise LoadingError(f"{directory} cannot be converted for another number of workers: {reason}")


def _import_deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # Its logger writes to stdout; passed on to the root logger it goes where this process logs.
    logger = logging.getLogger("DeepSpeed")
    logger.handlers.clear()
    logger.propagate = True
    return deepspeed
