"""Loads the linear layers of a model as 4-bit numbers, on which LoRA trains adapters (QLoRA, arXiv 2305.14314).

NF4 with quantized scales: 4.127 bits for a weight. Embeddings, norms and the output layer stay as they are. Invariant:
a layer multiplies by the same numbers in training and in scoring.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from aft_ray.training.model.bitsandbytes_import import import_bitsandbytes


def quantized_loading(numbers: str, dtype: str) -> dict[str, Any]:
    """What `from_pretrained` is given to quantize the weights while it reads them.

    Args:
        numbers: "nf4".
        dtype: the training dtype, in which a layer computes.

    Raises:
        ConfigError: bitsandbytes cannot be imported.
    """
    from transformers import BitsAndBytesConfig

    import_bitsandbytes(f"lora.quantize={numbers}")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=numbers,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    # Without a device transformers would take the process's current one, which DeepSpeed sets later.
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    return {"quantization_config": config, "device_map": {"": device}}


def settle(model: Any) -> None:
    """Makes a quantized model one that a run can train, save and publish."""
    from bitsandbytes.nn import Linear4bit

    # A model directory has whole weights again, so its config must not say that they are packed.
    del model.config.quantization_config
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # Else a CPU with AVX-512 would repack the weights at the first scoring, with scales that are rounded.
            module.support_avx512bf16_for_cpu = False
            module.register_state_dict_post_hook(_leave_out_scales)


def _leave_out_scales(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Removes the scales of a packed weight from a state dict: they are frozen like the weight, and loaded with it."""
    for key in module.weight.quant_state.as_dict(packed=True):
        state.pop(f"{prefix}weight.{key}", None)
