"""The files of a Hugging Face model: its config, its context length, its weights.

Invariant: nothing here loads weights; a model whose weights are not safetensors files is refused, since other formats
can run code when they are loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aft_ray.config.messages import first_line
from aft_ray.config.run import ConfigError, RunConfig
from aft_ray.storage.run_dir import local_model


def check_model(config: RunConfig) -> Any:
    """Checks the files of `model.name`.

    Returns:
        The model's Hugging Face config.

    Raises:
        ConfigError: the model is missing, has no safetensors file, or has a shorter context than `model.max_length`.
    """
    model_config = load_model_config(config)
    context = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if context is not None and config.model.max_length > context:
        raise ConfigError(
            f"model.max_length ({config.model.max_length}, prompt + response) is longer than the context of "
            f"{config.model.name} ({context} tokens); lower it to at most {context}"
        )
    directory = Path(local_model(config.model.name))
    if directory.is_dir() and not any(directory.glob("*.safetensors")):
        raise ConfigError(
            f"{directory} has no .safetensors file; other weight formats are not loaded, since they can run code"
        )
    return model_config


def load_model_config(config: RunConfig) -> Any:
    """The Hugging Face config of `model.name`. Raises ConfigError that names what is missing."""
    from transformers import AutoConfig

    name = local_model(config.model.name)
    if _looks_like_a_path(name) and not Path(name).is_dir():
        raise ConfigError(f"model.name={name} is not a directory; give a Hugging Face model directory or a hub name")
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=config.model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.name={name} cannot be read as a model: {first_line(error)}") from error


def _looks_like_a_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") != 1 or Path(name).exists()
