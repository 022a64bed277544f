"""Attention over packed rows, as an attention implementation of transformers named `aft_packed`.

In a row (`training.forward.packing`) a prompt token sees the past of its prompt; a response token sees its whole prompt
and the past of its own response. A model that was loaded with this implementation takes `model(**packed_inputs(row))`;
called as any other model, it computes what transformers' SDPA does.

What a model says about its masks keeps its meaning: transformers hands its mask function to `_packed_mask`, and here it
is evaluated on the positions of tokens instead of their columns, so a sliding window counts tokens of one response.

On the CPU attention runs block by block, and no mask is larger than the block that it is for. On CUDA it is
FlexAttention (`training.forward.packed_flex`), which has not run on a GPU yet.

Invariants: the output of a token does not depend on other responses or groups of its row; an argument that would change
the output and is not known here is refused. Nothing is kept between calls but compiled functions, since activation
checkpointing calls again from another thread.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from aft_ray.training.forward.packed_flex import BLOCK, Layout, MaskFunction, block_mask, flex
from aft_ray.training.forward.packing import PackedRow
from aft_ray.training.forward.sequence_parallel import SequenceParallel, attend_together

PACKED = "aft_packed"

# Layers in which a token sees tokens of its past, and nothing passes from column to column otherwise.
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
# Arguments that models pass to every attention implementation and that do not change the output of a packed row:
# what a model returns beside it, and what the mask function says already.
_WITHOUT_EFFECT = {
    "layer_idx", "logits_to_keep", "num_items_in_batch", "output_attentions", "output_hidden_states",
    "output_router_logits", "position_ids", "return_dict", "sliding_window", "use_cache",
}  # fmt: skip


class PackedAttentionError(ValueError):
    """A model asks for an attention that packed rows do not have. The message is one sentence."""


def packed_inputs(row: PackedRow) -> dict[str, Any]:
    """The keyword arguments with which a model computes a row.

    The attention mask has a 1 for each column. Without it transformers would look for sequences in the positions, wait
    for the device to do so, and keep the responses of a group from seeing their prompt.
    """
    return {
        "input_ids": row.input_ids,
        "position_ids": row.position_ids,
        "attention_mask": torch.ones_like(row.input_ids),
        "packed_layout": row.layout,
        "use_cache": False,
    }


def cannot_share_prompts(model: Any) -> str | None:
    """Why a model cannot compute packed rows, as a clause; None if nothing is known that keeps it from doing so.

    It looks at the model's structure. That packed rows give the scores of plain rows is for a comparison to show.
    """
    reason = _structural_reason(model)
    config = model.config.get_text_config()
    if reason is None and config._attn_implementation != PACKED:
        return f"its attention implementation is {config._attn_implementation}"
    return reason


def use_packed_attention(model: Any) -> None:
    """Gives a model this attention, if its structure permits it. It needs no weights, so they may be partitioned."""
    register()
    if _structural_reason(model) is None:
        model.set_attn_implementation(PACKED)


def _structural_reason(model: Any) -> str | None:
    name, config = type(model).__name__, model.config.get_text_config()
    if not model._supports_attention_backend:
        return f"{name} does not take attention functions of others"
    kinds = set(getattr(config, "layer_types", None) or []) - _ATTENTION_LAYERS
    if kinds:
        return f"{name} has layers of the kind {sorted(kinds)[0]}"
    if any(isinstance(module, torch.nn.Conv1d) for module in model.modules()):
        return f"{name} has convolutions over the columns of a row"
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", None) == "alibi":
        return f"{name} adds a bias of the distance between columns (ALiBi)"
    if any(parameter.rpartition(".")[2] == "sinks" for parameter, _ in model.named_parameters()):
        return f"{name} has attention sinks"
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", False):
        return f"{name} is not causal"
    return None


def register() -> None:
    """Makes `aft_packed` known to transformers. It may be called again."""
    from transformers import AttentionInterface, AttentionMaskInterface

    # Dynamo, which would trace every layout anew, calls it as it is; FlexAttention is compiled by itself.
    opaque: Any = torch.compiler.disable(packed_attention)  # type: ignore[no-untyped-call]
    AttentionInterface.register(PACKED, opaque)
    AttentionMaskInterface.register(PACKED, _packed_mask)


class PackedMask:
    """What transformers says about the mask of one kind of layer in one forward pass; the layers share it.

    The layout of the row is known only to the attention function, so the mask itself is made there, once.

    Attributes:
        arguments: those of a mask interface of transformers.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self._dense: list[Tensor | None] = []
        self._blocks: tuple[Layout, Any] | None = None

    def dense(self) -> Tensor | None:
        """The mask of plain rows, as transformers' SDPA takes it."""
        from transformers.masking_utils import sdpa_mask

        if not self._dense:
            self._dense.append(sdpa_mask(**self.arguments))
        return self._dense[0]

    def function(self, layout: Layout) -> MaskFunction | None:
        """The mask function; None where it is causal and nothing else over the positions of a row.

        Raises:
            PackedAttentionError: it depends on columns.
        """
        from transformers.masking_utils import causal_mask_function

        arguments = self.arguments
        if arguments.get("attention_mask") is None or arguments.get("use_vmap") or arguments.get("q_offset"):
            raise PackedAttentionError("a packed row takes the arguments that packed_inputs() gives, and no others")
        window = arguments.get("local_size")
        if arguments["mask_function"] is causal_mask_function or (window is not None and _longest(layout) <= window):
            return None
        function: MaskFunction = arguments["mask_function"]
        return function

    def blocks(self, layout: Layout, device: torch.device) -> Any:
        """FlexAttention's block mask of a row, made on the first call."""
        if self._blocks is None or self._blocks[0] != layout:
            self._blocks = (layout, block_mask(layout, self.function(layout), device))
        return self._blocks[1]


def _packed_mask(**arguments: Any) -> PackedMask:
    return PackedMask(arguments)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: PackedMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    packed_layout: Layout | None = None,
    sequence_parallel: SequenceParallel | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in each layer.

    Args:
        query: [batch, heads, columns, width]; a packed row has batch 1.
        key, value: [batch, heads or a divisor of it, columns, width].
        packed_layout: the layout of a packed row; None for plain rows.
        sequence_parallel: who computes the row together; then the tensors have this rank's share of the columns.

    Returns:
        [batch, columns, heads, width], and None for the attention weights.

    Raises:
        PackedAttentionError: the layer passes an argument that is not known here.
    """
    if packed_layout is None:
        return _plain_attention(module, query, key, value, attention_mask, dropout, scaling, softcap, others)
    if others.pop("is_causal", None) is False:
        raise PackedAttentionError(f"{type(module).__name__} is not causal, and packed rows are")
    if changing := sorted(name for name, given in others.items() if given is not None and name not in _WITHOUT_EFFECT):
        raise PackedAttentionError(f"{type(module).__name__} passes {changing[0]}, which packed rows do not have")
    if not isinstance(attention_mask, PackedMask):
        raise PackedAttentionError(f"{type(module).__name__} does not use the mask that was made for packed rows")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    attend = functools.partial(
        _attend_to_row, says=attention_mask, layout=packed_layout, dropout=dropout, scaling=scaling, softcap=softcap
    )
    if sequence_parallel is not None:
        return attend_together(sequence_parallel, attend, query, key, value), None
    return attend(query, key, value), None


def _attend_to_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    says: PackedMask,
    layout: Layout,
    dropout: float,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """Attention over all columns of a row. Returns [1, columns, heads, width]."""
    if query.is_cuda and not dropout and query.shape[2] >= BLOCK:
        return flex(query, key, value, says.blocks(layout, query.device), scaling, softcap).transpose(1, 2)
    mask = says.function(layout)
    same_width = query.shape[-1] == value.shape[-1]
    if mask is None and not dropout and softcap is None and same_width and query.device.type == "cpu":
        shared: Any = _SharedPrompts.apply  # type: ignore[no-untyped-call]
        out: Tensor = shared(query, key, value, layout, scaling)
        return out
    return _attend_in_blocks(query, key, value, layout, mask, dropout, scaling, softcap)


def _plain_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: PackedMask | Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    others: dict[str, Any],
) -> tuple[Tensor, None]:
    """What transformers' SDPA computes. Unlike it, this honours soft-capping and refuses attention sinks."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if others.get("s_aux") is not None:
        raise PackedAttentionError(f"{type(module).__name__} has attention sinks; set attn_implementation to eager")
    dense = attention_mask.dense() if isinstance(attention_mask, PackedMask) else attention_mask
    if softcap is None:
        out, _ = sdpa_attention_forward(module, query, key, value, dense, dropout, scaling, **others)
        return out, None
    if dense is None:
        columns = query.shape[2], key.shape[2]
        dense = torch.ones(columns, dtype=torch.bool, device=query.device).tril(columns[1] - columns[0])
    out = _attend(query, key, value, dense, dropout, scaling or query.shape[-1] ** -0.5, softcap)
    return out.transpose(1, 2).contiguous(), None


# ---- CPU ----


class _SharedPrompts(torch.autograd.Function):
    """Full causal attention of a packed row in two parts, each a kernel that needs no mask.

    A prompt with its first response is an ordinary sequence. Each of the others attends to its own past, and all of
    them together to the prompt. The log-sum-exp of both parts says how their outputs are to be weighted. The kernel's
    backward takes the weighted output and the joint log-sum-exp, and then computes the exact gradient of its part.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float) -> Tensor:
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        outs: list[Tensor] = []
        sums: list[Tensor] = []
        for q, k, v in zip(*(_sequences(x, layout) for x in (query, key, value)), strict=True):
            out, logsumexp = attend(q, k, v, 0.0, True, scale=scaling)
            outs.append(out.transpose(1, 2))
            sums.append(logsumexp.transpose(1, 2))
        joint_out = torch.cat(outs, dim=1)
        joint_sum = torch.cat(sums, dim=1)
        for prompt, own in _shared(layout):
            out, logsumexp = attend(query[:, :, own], key[:, :, prompt], value[:, :, prompt], 0.0, False, scale=scaling)
            own_sum, shared_sum = joint_sum[:, own], logsumexp.transpose(1, 2)
            share = torch.sigmoid(shared_sum - own_sum).unsqueeze(-1)
            own_out, shared_out = joint_out[:, own].to(share.dtype), out.transpose(1, 2).to(share.dtype)
            joint_out[:, own] = own_out.lerp(shared_out, share)
            joint_sum[:, own] = torch.logaddexp(own_sum, shared_sum)
        ctx.save_for_backward(query, key, value, joint_out, joint_sum)
        ctx.layout, ctx.scaling = layout, scaling
        return joint_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, logsumexp = ctx.saved_tensors
        layout, scaling = ctx.layout, ctx.scaling
        differentiate = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        given = (grads[0].transpose(1, 2), query, key, value, out.transpose(1, 2), logsumexp.transpose(1, 2))
        parts = [
            [part.transpose(1, 2) for part in differentiate(*one, 0.0, True, scale=scaling)]
            for one in zip(*(_sequences(x, layout) for x in given), strict=True)
        ]
        grad_query, grad_key, grad_value = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        for prompt, own in _shared(layout):
            grad, q, k, v, o, s = given
            dq, dk, dv = differentiate(
                grad[:, :, own], q[:, :, own], k[:, :, prompt], v[:, :, prompt], o[:, :, own], s[:, :, own],
                0.0, False, scale=scaling,
            )  # fmt: skip
            grad_query[:, own] += dq.transpose(1, 2)
            grad_key[:, prompt] += dk.transpose(1, 2)
            grad_value[:, prompt] += dv.transpose(1, 2)
        return grad_query.transpose(1, 2), grad_key.transpose(1, 2), grad_value.transpose(1, 2), None, None


def _sequences(tensor: Tensor, layout: Layout) -> tuple[Tensor, ...]:
    """The columns (dimension 2) of each prompt with its first response, and of each other response that has any."""
    return _split(tensor, [n for one in layout for n in (one.tokens + sum(one.responses[:1]), *one.responses[1:]) if n])


def _split(tensor: Tensor, columns: list[int]) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = tensor.split(columns, dim=2)  # type: ignore[no-untyped-call]
    return parts


def _shared(layout: Layout) -> Iterator[tuple[slice, slice]]:
    """The columns of each prompt and those of all its responses but the first, where there are any."""
    for one in layout:
        first = one.start + one.tokens
        others = first + sum(one.responses[:1])
        if one.stop > others:
            yield slice(one.start, first), slice(others, one.stop)


def _attend_in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    mask: MaskFunction | None,
    dropout: float,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """Attention of any kind, prompt by prompt and response by response. Returns [1, columns, heads, width]."""
    columns = [n for one in layout for n in (one.tokens, *one.responses) if n]
    parts = iter(zip(*(_split(x, columns) for x in (query, key, value)), strict=True))
    outs = []
    for one in layout:
        q, prompt_key, prompt_value = next(parts)
        visible = block_of_mask(mask, 0, one.tokens, query.device)
        outs.append(_attend(q, prompt_key, prompt_value, visible, dropout, scaling, softcap))
        for n in filter(None, one.responses):
            q, k, v = next(parts)
            visible = block_of_mask(mask, one.tokens, one.tokens + n, query.device)
            k, v = torch.cat((prompt_key, k), dim=2), torch.cat((prompt_value, v), dim=2)
            outs.append(_attend(q, k, v, visible, dropout, scaling, softcap))
    return torch.cat([out.transpose(1, 2) for out in outs], dim=1)


def block_of_mask(mask: MaskFunction | None, first: int, stop: int, device: torch.device) -> Tensor:
    """What the tokens at the positions [first, stop) see of [0, stop): [stop - first, stop] bool."""
    queries = torch.arange(first, stop, device=device)[:, None]
    keys = torch.arange(stop, device=device)[None, :]
    if mask is None:
        return keys <= queries
    zero = torch.zeros((), dtype=torch.int64, device=device)
    return mask(zero, zero, queries, keys).expand(stop - first, stop)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout: float, scaling: float, softcap: float | None
) -> Tensor:
    """Attention, [batch, heads, queries, width], under a mask that broadcasts to [batch, heads, queries, keys]."""
    if softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=True
        )
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * (scaling / softcap))
    # A padding token of a plain row sees nothing; with the smallest number its weights are equal and not NaN.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    return F.dropout(weights, dropout) @ value


def _longest(layout: Layout) -> int:
    """Tokens of the longest prompt with one of its responses."""
    return max(one.tokens + max(one.responses, default=0) for one in layout)
