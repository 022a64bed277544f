"""The parameters of LoRA adapters: their names, and how they are merged into the weights.

A weight W with an adapter (A, B) of rank r stands for W + alpha / r * B A (LoRA, arXiv 2106.09685). Invariant: merging
makes new tensors; it changes neither the module's weights nor its adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from aft_ray.weights.quantized import whole_tensor

if TYPE_CHECKING:  # the driver reads version manifests without torch
    import torch

ADAPTER_FILE = "adapter_model.safetensors"
# The files of an adapter's directory, in peft's format.
ADAPTER_FILES = (ADAPTER_FILE, "adapter_config.json")
_A, _B, _BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer."


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return name.endswith((_A, _B))


def stored_name(name: str) -> str:
    """The name of an adapter's parameter in the file that peft and vLLM read."""
    return f"base_model.model.{name.replace('.default.', '.')}"


def published_name(name: str) -> str:
    """The Hugging Face name of a weight, given its own name in the module or that of its adapter's parameter."""
    for part in (_A, _B):
        if name.endswith(part):
            return f"{name.removesuffix(part)}.weight"
    return name.replace(_BASE, ".")


def merged(model: Any, parameters: Sequence[tuple[str, torch.nn.Parameter]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights among some parameters, under their Hugging Face names, with their adapters merged.

    A weight with an adapter becomes a new float32 tensor, and another one of 4 bits a new tensor in the training dtype;
    the rest is yielded as it is, without a copy.

    Args:
        parameters: whole parameters by name; a weight and its adapter's parameters must be given together.
    """
    by_name = dict(parameters)
    for name, parameter in parameters:
        if is_adapter(name):
            continue
        tensor = whole_tensor(parameter)
        layer = name.removesuffix(f"{_BASE}weight")
        if layer + _A in by_name:
            a, b = by_name[layer + _A].detach().float(), by_name[layer + _B].detach().float()
            config = model.peft_config["default"]
            tensor = tensor.float() + (config.lora_alpha / config.r) * (b @ a)
        yield published_name(name), tensor
