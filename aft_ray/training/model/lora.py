"""Puts the low-rank adapters of the config's `lora` section into the model that is trained.

Invariant: only the adapters are trained; all other weights stay bit for bit as they were loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from aft_ray.config.run import ConfigError, LoraConfig
from aft_ray.weights.adapter import ADAPTER_FILE, is_adapter, stored_name


def check_targets(model: Any, lora: LoraConfig) -> None:
    """Checks `lora.targets` against the model.

    Raises:
        ConfigError: a target is not a linear layer of the model, or its weight is tied to the embeddings.
    """
    layers = {name.rpartition(".")[2]: name for name, one in model.named_modules() if isinstance(one, torch.nn.Linear)}
    if unknown := [target for target in lora.targets if target not in layers]:
        raise ConfigError(
            f"lora.targets names {unknown[0]!r}, and no linear layer of {type(model).__name__} is called that; "
            f"they are called {', '.join(layers)}"
        )
    head = output_layer_name(model)
    if model.config.tie_word_embeddings and head in lora.targets:
        raise ConfigError(
            f"lora.targets names {head}, whose weight is also the embedding of {type(model).__name__}: an adapter "
            f"of the one cannot be merged without changing the other, so leave it out"
        )


def output_layer_name(model: Any) -> str:
    """The last part of the output layer's name, `lm_head` in most models."""
    head = model.get_output_embeddings()
    name: str = next(name for name, one in model.named_modules() if one is head)
    return name.rpartition(".")[2]


def add_adapters(model: Any, lora: LoraConfig, base: str) -> None:
    """Puts an adapter into each layer of `lora.targets` and freezes all other weights.

    New adapters draw their first matrix from torch's global random state and change no output yet.

    Args:
        base: the directory or name that the model was loaded from.

    Raises:
        ConfigError: a target does not fit the model.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    check_targets(model, lora)
    alpha: Any = lora.alpha  # peft declares an int, but only divides it by the rank
    config = PeftConfig(
        r=lora.rank,
        lora_alpha=alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )
    inject_adapter_in_model(config, model)


def load_adapter(model: Any, directory: Path) -> None:
    """Copies the values of an adapter directory into the model's adapters.

    Must be called before DeepSpeed partitions the model.
    """
    from safetensors.torch import load_file

    stored = load_file(directory / ADAPTER_FILE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.copy_(stored[stored_name(name)])
