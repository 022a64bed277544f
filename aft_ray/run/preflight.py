"""Checks of a run before any actor starts: DeepSpeed's keys, the model, its chat template, experts and adapters."""

from __future__ import annotations

from typing import Any

from aft_ray.config.run import ConfigError, LoraConfig, RunConfig
from aft_ray.inference.installed_arguments import check_engine_arguments
from aft_ray.storage.model_files import check_model
from aft_ray.tasks.dataset import load_tokenizer
from aft_ray.tasks.response_end import response_ends
from aft_ray.training.deepspeed_config import check_options
from aft_ray.training.model.bitsandbytes_import import check_bitsandbytes

# Mixtures of experts for which a fresh engine, an updated one and transformers give the same scores: model_type.
EXPERT_TYPES = ("granitemoe", "olmoe", "qwen2_moe", "qwen3_moe")
_NUMBERS_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def check_run(config: RunConfig) -> None:
    """Raises ConfigError when the model cannot be asked or trained, or vLLM cannot be started, as the config says."""
    check_options(config.training, config.model.dtype)
    check_bitsandbytes(config)
    if config.training.attn_implementation != "packed":
        _check_attention(config.training.attn_implementation)
    check_engine_arguments(config.sampling.engine_args, "sampling.engine_args")
    model_config = check_model(config)
    if config.training.sequence_parallel_size > 1:
        _check_heads(config.training.sequence_parallel_size, model_config)
    response_ends(config, load_tokenizer(config))
    if config.needs_samplers:
        check_experts(model_config)
    if config.lora is not None:
        _check_adapters(config, config.lora, model_config)


def _check_attention(attn_implementation: str) -> None:
    from aft_ray.training.model.loading import check_attention  # it imports torch

    check_attention(attn_implementation)


def _check_heads(sequence_parallel_size: int, model_config: Any) -> None:
    from aft_ray.training.forward.sequence_parallel import check_heads  # it imports torch

    text_config = model_config.get_text_config()
    heads = text_config.num_attention_heads
    check_heads(sequence_parallel_size, heads, getattr(text_config, "num_key_value_heads", None) or heads)


def check_experts(model_config: Any) -> None:
    """Raises ConfigError for a mixture of experts whose weights are not known to be right in a running engine.

    The types differ in the names of their weights, and in how vLLM lays them out for its kernels.
    """
    text_config = model_config.get_text_config()
    experts = max(int(getattr(text_config, key, None) or 0) for key in _NUMBERS_OF_EXPERTS)
    if experts > 1 and text_config.model_type not in EXPERT_TYPES:
        raise ConfigError(
            f"model.name is a mixture of {experts} experts of the type {text_config.model_type}, whose new weights are "
            f"not known to be right in a running engine; use a model of one of the types {', '.join(EXPERT_TYPES)}, or "
            f"one without experts"
        )


def _check_adapters(config: RunConfig, lora: LoraConfig, model_config: Any) -> None:
    """Raises ConfigError when `lora.targets` names no layer of the model, or one that cannot have an adapter."""
    import torch
    from transformers import AutoModelForCausalLM

    from aft_ray.training.model.lora import check_targets, output_layer_name

    with torch.device("meta"):  # the model's layers without their weights
        model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=config.model.trust_remote_code)
    check_targets(model, lora)
    if config.weights.transport == "lora" and output_layer_name(model) in lora.targets:
        raise ConfigError(
            f"lora.targets names the output layer {output_layer_name(model)}, and vLLM cannot score sequences with "
            f"an adapter there; leave it out, or publish merged weights with another weights.transport"
        )
