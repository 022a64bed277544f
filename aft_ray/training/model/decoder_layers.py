"""What a run does to the decoder layers of its model: recomputing activations in the backward pass, and compilation.

Invariant: neither changes the names of the parameters, nor what a step computes, beyond the rounding of compiled
kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
import torch._inductor.config
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from aft_ray.config.run import ConfigError

_aten = torch.ops.aten
# The operations whose results `selective` keeps: matrix products, and attention in each of torch's kernels. They take
# nearly all of a layer's time; what is recomputed reads and writes memory only.
_KEPT: list[Any] = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten._grouped_mm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_fused_attention_overrideable.default,
    torch.ops.higher_order.flex_attention,
    torch.ops.higher_order.inductor_compiled_code,  # FlexAttention, which is compiled by itself
]


def recompute_activations(model: Any, mode: str) -> None:
    """Makes each decoder layer keep less than all of its activations, and compute the rest again when it is needed.

    Args:
        mode: `training.activation_checkpointing`. "none" keeps everything; "selective" keeps the results of matrix
            products and of attention; "full" keeps the layer's input alone.
    """
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        # Else compiled code would be computed again, since its operations are hidden from `_KEPT`.
        torch._inductor.config.wrap_inductor_compiled_regions = True
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _KEPT)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def keep_gathers_apart(offload: Any) -> None:
    """Hides what ZeRO-3 does before and after a module from selective recomputing. For "selective" alone.

    torch counts the operations of a layer, and expects the same ones when it computes the layer again. Which weights
    ZeRO-3 gathers inside a layer differs: some are there already, because they were asked for ahead.

    Args:
        offload: the `parameter_offload` of DeepSpeed's stage-3 optimizer, whose hooks look these methods up by name.
    """
    for name in (
        "pre_sub_module_forward_function",
        "post_sub_module_forward_function",
        "pre_sub_module_backward_function",
        "post_sub_module_backward_function",
    ):
        setattr(offload, name, _unseen(getattr(offload, name)))


def _unseen(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, outside of the modes through which torch sees operations."""

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        # torch has no public way: `torch.utils.checkpoint` knows its own modes alone, not subclasses that look away.
        with _disable_current_modes():  # type: ignore[no-untyped-call]
            return function(*arguments, **named)

    return call


def compile_layers(model: Any) -> None:
    """Compiles each decoder layer at its first call, in place and for rows of any length.

    All layers of a kind share the compiled code, so the time of compilation does not grow with their number.

    Raises:
        ConfigError: the model has no decoder layers that transformers marks as such.
    """
    layers = decoder_layers(model)
    if not layers:
        raise ConfigError(
            f"training.compile compiles decoder layers, and {type(model).__name__} marks none as such; set "
            f"training.compile=false"
        )
    for layer in layers:
        layer.compile(dynamic=True)


def decoder_layers(model: Any) -> list[torch.nn.Module]:
    """The decoder layers of a model, in its order: what transformers recomputes as one piece."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
