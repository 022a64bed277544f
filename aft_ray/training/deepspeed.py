"""The DeepSpeed engine: its configuration, the model in it, and its checkpoints.

Invariants: one config field picks the ZeRO stage and nothing else changes; DeepSpeed writes nothing to stdout. The
default process group exists already when an engine is built.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch

from aft_ray.config import ModelConfig, TrainingConfig

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
    if not torch.cuda.is_available():
        zero["overlap_comm"] = False
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


def load_model(
    path: str | Path, dtype: str, *, trust_remote_code: bool = False, config: dict[str, Any] | None = None
) -> Any:
    """The causal language model in a directory or on the hub, safetensors only, in training mode.

    config: DeepSpeed's; under ZeRO-3 the weights are sharded as they are created, so no rank holds the whole model.
    """
    from transformers import AutoModelForCausalLM

    sharded = None
    if config is not None and config["zero_optimization"]["stage"] == 3:
        from transformers.integrations import HfDeepSpeedConfig

        sharded = HfDeepSpeedConfig(config)  # transformers looks for it while it is alive
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=getattr(torch, dtype),
        attn_implementation="sdpa",
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
    )
    del sharded
    return model.train()


def build_engine(path: str | Path, model: ModelConfig, training: TrainingConfig) -> Any:
    """A DeepSpeed engine with AdamW on the model at `path`. All ranks call it together."""
    deepspeed = _import_deepspeed()
    config = ds_config(training, model.dtype)
    module = load_model(path, model.dtype, trust_remote_code=model.trust_remote_code, config=config)
    if training.activation_checkpointing:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(module.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay)
    with contextlib.redirect_stdout(sys.stderr):  # it prints that its communication op is built
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    return engine


def save(engine: Any, directory: str | Path, client_state: dict[str, Any]) -> None:
    """Writes this rank's shards of weights and optimizer. All ranks call it together."""
    engine.save_checkpoint(str(directory), tag=_TAG, client_state=client_state, save_latest=False)


def load(engine: Any, directory: str | Path) -> dict[str, Any]:
    """Restores weights and optimizer; the client state that was saved. Raises FileNotFoundError without a checkpoint.

    DeepSpeed unpickles what it reads: only ever give it a checkpoint that this run wrote itself.
    """
    path, client_state = engine.load_checkpoint(str(directory), tag=_TAG, load_lr_scheduler_states=False)
    if path is None:
        raise FileNotFoundError(f"no DeepSpeed checkpoint in {directory}")
    return dict(client_state)


def _import_deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # Its logger writes to stdout; passed on to the root logger it goes where this process logs.
    logger = logging.getLogger("DeepSpeed")
    logger.handlers.clear()
    logger.propagate = True
    return deepspeed
