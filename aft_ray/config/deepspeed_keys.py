"""The keys of DeepSpeed that `training.deepspeed` may not set, because a key of this config does or the run forbids it.

Invariant: this needs no DeepSpeed. Whether the installed DeepSpeed knows the other keys is checked by
`aft_ray.training.deepspeed_config` before a run starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from aft_ray.config.section import ConfigError

# Keys of DeepSpeed, and the key of this config that sets the same.
_OWNED = {
    "train_batch_size": "training.groups_per_step",
    "train_micro_batch_size_per_gpu": "training.tokens_per_microbatch",
    "gradient_accumulation_steps": "training.tokens_per_microbatch",
    "managed_gradient_accumulation": "training.tokens_per_microbatch",
    "gradient_clipping": "training.max_grad_norm",
    "zero_optimization.compute_grad_norm": "training.max_grad_norm",
    "optimizer": "training.optimizer",
    "zero_allow_untested_optimizer": "training.offload_optimizer",
    "zero_force_ds_cpu_optimizer": "training.offload_optimizer",
    "scheduler": "training.schedule",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "amp": "model.dtype",
    "torch_autocast": "model.dtype",
    "data_types": "model.dtype",
    "zero_optimization.stage": "training.zero_stage",
    "zero_optimization.legacy_stage1": "training.zero_stage",
    "zero_optimization.offload_optimizer.device": "training.offload_optimizer",
    "zero_optimization.offload_optimizer.nvme_path": "training.offload_optimizer",
    "zero_optimization.cpu_offload": "training.offload_optimizer",
    "zero_optimization.cpu_offload_use_pin_memory": "training.offload_optimizer",
    "zero_optimization.offload_param.device": "training.offload_parameters",
    "zero_optimization.offload_param.nvme_path": "training.offload_parameters",
    "zero_optimization.cpu_offload_param": "training.offload_parameters",
    "activation_checkpointing": "training.activation_checkpointing",
    "compile": "training.compile",
    "checkpoint": "training.keep_checkpoints",
    "datastates_ckpt": "training.keep_checkpoints",
    "nebula": "training.keep_checkpoints",
    "tensor_parallel": "training.workers and training.zero_stage",
    "expert_parallel": "training.workers and training.zero_stage",
    "pipeline": "training.workers and training.zero_stage",
    "sequence_parallel_size": "training.sequence_parallel_size",
    "data_parallel_size": "training.workers",
    "dataloader_drop_last": "training.groups_per_step",
    "data_efficiency": "rounds.questions_per_round",
}

# Keys of DeepSpeed that no key of this config sets, and why a run does not take them.
_REFUSED = {
    "gradient_allreduce_op": "the losses of the workers are scaled for gradients that are averaged",
    "zero_optimization.zero_quantized_gradients": "DeepSpeed's kernel reads gradients as float16, and those of a run "
    "are bfloat16 or float32",
    "zero_optimization.zenflow": "it postpones a part of each optimizer step, and a version would lack that part",
    "zero_optimization.offload_optimizer.super_offload": "it replaces the optimizer whose state the run saves",
    "zero_optimization.elastic_checkpoint": "a worker fetches only its own part of a training state",
    "zero_optimization.pipeline_loading_checkpoint": "workers load a training state together",
    "zero_optimization.load_from_fp32_weights": "a resumed run takes the same steps only with float32 weights",
    **dict.fromkeys(
        (
            "zero_optimization.gather_16bit_weights_on_model_save",
            "zero_optimization.stage3_gather_16bit_weights_on_model_save",
            "zero_optimization.stage3_gather_fp16_weights_on_model_save",
        ),
        "the run writes its model directories itself",
    ),
    **dict.fromkeys(
        (
            "autotuning",
            "compression_training",
            "hybrid_engine",
            "quantize_training",
            "seq_parallel_communication_data_type",
            "use_data_before_expert_parallelism",
            "weight_quantization",
        ),
        "a run does not use this part of DeepSpeed",
    ),
}

# Keys of `zero_optimization` that have an effect at stage 3 alone, and the beginnings of the names of others.
_STAGE_3 = {
    "prefetch_bucket_size",
    "param_persistence_threshold",
    "model_persistence_threshold",
    "max_live_parameters",
    "max_reuse_distance",
    "module_granularity_threshold",
    "use_all_reduce_for_fetch_params",
    "allgather_sequential",
    "sub_group_size",
    "memory_efficient_linear",
    "leaf_module",
}
_STAGE_3_PREFIXES = ("stage3_", "zero_hpz_", "zero_quantized_")


def check_deepspeed_keys(
    options: Mapping[str, Any], *, stage: int, workers: int, offload_optimizer: bool, offload_parameters: bool
) -> None:
    """Raises ConfigError, one sentence, when `training.deepspeed` has a key or value that a run cannot take.

    Args:
        options: `training.deepspeed`.
        stage, workers, offload_optimizer, offload_parameters: the keys of `training` that these options depend on.
    """
    for path, value in _paths(options):
        name = f"training.deepspeed.{path}"
        if path in _OWNED:
            raise ConfigError(f"{name} is what {_OWNED[path]} sets; remove it")
        if path in _REFUSED:
            raise ConfigError(f"{name} is not for a run: {_REFUSED[path]}; remove it")
        if value == "auto":
            raise ConfigError(f"{name}=auto has no meaning here; give a value, or remove it for DeepSpeed's default")
    zero = options.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        raise ConfigError(f"training.deepspeed.zero_optimization={zero!r} must be a section of keys")
    if zero and stage == 0:
        raise ConfigError("training.deepspeed.zero_optimization needs training.zero_stage of at least 1, not 0")
    for key in zero:
        if stage < 3 and (key in _STAGE_3 or key.startswith(_STAGE_3_PREFIXES)):
            raise ConfigError(f"training.deepspeed.zero_optimization.{key} needs training.zero_stage=3, not {stage}")
    for section, key, on in (
        ("offload_optimizer", "training.offload_optimizer", offload_optimizer),
        ("offload_param", "training.offload_parameters", offload_parameters),
    ):
        if section in zero and not on:
            raise ConfigError(f"training.deepspeed.zero_optimization.{section} needs {key}=true")
    partition = zero.get("zero_hpz_partition_size", 1)
    if isinstance(partition, int) and (partition < 1 or workers % partition):
        raise ConfigError(
            f"training.deepspeed.zero_optimization.zero_hpz_partition_size={partition} does not divide "
            f"training.workers={workers}; it is usually the number of workers of a node"
        )


def _paths(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted path and the value of every key, those of sections too."""
    for key, value in options.items():
        yield f"{prefix}{key}", value
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{key}.")
