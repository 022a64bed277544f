"""Low-rank adapters in the model that is trained: what `lora` in the config asks for, in place.

Invariant: only adapters take gradients; the weights beside them stay as they were loaded, bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from aft_ray.config.run import ConfigError, LoraConfig
from aft_ray.weights.adapter import ADAPTER_FILE, is_adapter, stored_name


def check_targets(model: Any, lora: LoraConfig) -> None:
    """Raises ConfigError, naming the linear layers there are, when a target of `lora.targets` is none of them."""
    layers = {name.rpartition(".")[2]: name for name, one in model.named_modules() if isinstance(one, torch.nn.Linear)}
    if unknown := [target for target in lora.targets if target not in layers]:
        raise ConfigError(
            f"lora.targets names {unknown[0]!r}, and no linear layer of {type(model).__name__} is called that; "
            f"they are called {', '.join(layers)}"
        )
    head = head_of(model)
    if model.config.tie_word_embeddings and head in lora.targets:
        raise ConfigError(
            f"lora.targets names {head}, whose weight is also the embedding of {type(model).__name__}: an adapter "
            f"of the one cannot be merged without changing the other, so leave it out"
        )


def head_of(model: Any) -> str:
    """What the output layer is called."""
    head = model.get_output_embeddings()
    name: str = next(name for name, one in model.named_modules() if one is head)
    return name.rpartition(".")[2]


def add_adapters(model: Any, lora: LoraConfig, base: str) -> None:
    """Puts an adapter beside each targeted layer, all but the adapters frozen. base: what the model was loaded from.

    The adapters are random as torch's seed says, and add nothing yet. Raises ConfigError.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    check_targets(model, lora)
    alpha: Any = lora.alpha  # peft says int, and only ever divides by the rank
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
    """Gives the model's adapters the values of an adapter directory. Before DeepSpeed has partitioned them."""
    from safetensors.torch import load_file

    stored = load_file(directory / ADAPTER_FILE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.copy_(stored[stored_name(name)])
