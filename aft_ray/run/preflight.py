"""Checks of a run before any actor starts: DeepSpeed's keys, the model, and the layers that get LoRA adapters."""

from __future__ import annotations

from typing import Any

from aft_ray.config.run import ConfigError, LoraConfig, RunConfig
from aft_ray.inference.installed_arguments import check_engine_arguments
from aft_ray.storage.model_files import check_model
from aft_ray.training.deepspeed_config import check_options


def check_run(config: RunConfig) -> None:
    """Raises ConfigError when the model cannot be trained, or vLLM cannot be started, as the config says."""
    check_options(config.training, config.model.dtype)
    check_engine_arguments(config.sampling.engine_args, "sampling.engine_args")
    model_config = check_model(config)
    if config.lora is not None:
        _check_adapters(config, config.lora, model_config)


def _check_adapters(config: RunConfig, lora: LoraConfig, model_config: Any) -> None:
    """Raises ConfigError when `lora.targets` names no layer of the model, or one that cannot have an adapter."""
    import torch
    from transformers import AutoModelForCausalLM

    from aft_ray.training.lora import check_targets, output_layer_name

    with torch.device("meta"):  # the model's layers without their weights
        model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=config.model.trust_remote_code)
    check_targets(model, lora)
    if config.weights.transport == "lora" and output_layer_name(model) in lora.targets:
        raise ConfigError(
            f"lora.targets names the output layer {output_layer_name(model)}, and vLLM cannot score sequences with "
            f"an adapter there; leave it out, or publish merged weights with another weights.transport"
        )
