"""What can be known to be wrong before any actor starts: the model, its context, its adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aft_ray.config.run import ConfigError, LoraConfig, RunConfig
from aft_ray.storage.run_dir import local_model


def check_model(config: RunConfig) -> None:
    """Raises ConfigError when the model is missing, is no safetensors model, or is shorter than `model.max_length`."""
    model_config = load_model_config(config)
    context = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if context is not None and config.model.max_length > context:
        raise ConfigError(
            f"model.max_length ({config.model.max_length}, prompt + response) is longer than the context of "
            f"{config.model.name} ({context} tokens); lower it to at most {context}"
        )
    if config.lora is not None:
        check_adapters(config, config.lora, model_config)
    directory = Path(local_model(config.model.name))
    if directory.is_dir() and not any(directory.glob("*.safetensors")):
        raise ConfigError(
            f"{directory} has no .safetensors file; other weight formats are not loaded, since they can run code"
        )


def check_adapters(config: RunConfig, lora: LoraConfig, model_config: Any) -> None:
    """Raises ConfigError when a target of `lora.targets` cannot be one. The model is built empty for that."""
    import torch
    from transformers import AutoModelForCausalLM

    from aft_ray.training.lora import check_targets, output_layer_name

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=config.model.trust_remote_code)
    check_targets(model, lora)
    if config.weights.transport == "lora" and output_layer_name(model) in lora.targets:
        raise ConfigError(
            f"lora.targets names the output layer {output_layer_name(model)}, and vLLM cannot score sequences with "
            f"an adapter there; leave it out, or publish merged weights with another weights.transport"
        )


def load_model_config(config: RunConfig) -> Any:
    """The model's Hugging Face config. Raises ConfigError naming what is missing."""
    from transformers import AutoConfig

    name = local_model(config.model.name)
    if _looks_like_a_path(name) and not Path(name).is_dir():
        raise ConfigError(f"model.name={name} is not a directory; give a Hugging Face model directory or a hub name")
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=config.model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.name={name} cannot be read as a model: {str(error).strip().splitlines()[0]}"
        ) from error


def _looks_like_a_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") != 1 or Path(name).exists()
