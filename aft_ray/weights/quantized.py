"""The 4-bit weights of QLoRA as what they stand for: tensors in the training dtype.

bitsandbytes keeps such a weight as packed bytes, with the shape and the scales of its blocks beside them. Invariant:
the tensor that comes from here is the very one that the trainer multiplies by, so that engines which hold it score as
the trainer does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def is_quantized(parameter: Any) -> bool:
    """Whether a parameter holds packed 4-bit numbers."""
    return hasattr(parameter, "quant_state")


def whole_shape(parameter: Any) -> tuple[int, ...]:
    """The shape of the weight that a parameter stands for: one that is packed, or that ZeRO-3 has sharded, has less."""
    if is_quantized(parameter):
        return tuple(parameter.quant_state.shape)
    return tuple(parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape)


def whole_tensor(parameter: Any) -> torch.Tensor:
    """The weight that a gathered parameter stands for: itself without a copy, or a new tensor from packed numbers."""
    tensor: torch.Tensor = parameter.detach()
    if is_quantized(parameter):
        from bitsandbytes.functional import dequantize_4bit

        tensor = dequantize_4bit(tensor, parameter.quant_state).detach()
    return tensor
