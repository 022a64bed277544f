"""Sequence parallelism: some ranks compute one packed row together (DeepSpeed Ulysses).

Consecutive ranks form a process group of `training.sequence_parallel_size`. All of them have the same row, and each
computes an equal share of its columns. Only attention needs all columns: there the ranks send each other columns, so
that each has all columns of its share of the heads, and send the outputs back. The log-probability of a target is
computed by the rank that has the column that predicts it, and then all ranks of the process group learn those of all
targets.

Invariant: the gradients of these ranks add up to the gradient of the row. So each computes the loss of the whole row,
and gradients are averaged over all ranks of the run and multiplied by their number, as without this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from aft_ray.config.run import ConfigError
from aft_ray.training.forward.packing import PackedPrompt, PackedRow


@dataclass(frozen=True, slots=True)
class SequenceParallel:
    """This rank's place among those that compute a row together.

    Attributes:
        rank: its number in the process group, which is also that of its share of the columns and heads.
        size: ranks in the process group, at least 2.
    """

    process_group: Any
    rank: int
    size: int


@dataclass(frozen=True, slots=True)
class RowShare:
    """What one rank computes of a row.

    Attributes:
        layout: that of the whole row, with the columns at its end that make it a multiple of the ranks.
        input_ids, position_ids: [1, columns / ranks] int64.
        predicting: [own targets] int64, the column in this share whose hidden state predicts a target.
        own_targets: [own targets] int64, the indexes of the row's targets that are predicted here.
    """

    layout: tuple[PackedPrompt, ...]
    input_ids: Tensor
    position_ids: Tensor
    predicting: Tensor
    own_targets: Tensor


def join_sequence_parallel(size: int) -> SequenceParallel | None:
    """This rank's place among the ranks; None for groups of one. All ranks call it together.

    The process groups have torch's default timeout, which `process_groups.set_default_timeout` sets.
    """
    if size == 1:
        return None
    process_group, _ = dist.new_subgroups(size)  # type: ignore[no-untyped-call]
    return SequenceParallel(process_group, dist.get_rank(process_group), size)


def shared_inputs(share: RowShare, parallel: SequenceParallel) -> dict[str, Any]:
    """The keyword arguments with which a model computes a share; `packed_attention.packed_inputs` explains them."""
    return {
        "input_ids": share.input_ids,
        "position_ids": share.position_ids,
        "attention_mask": torch.ones_like(share.input_ids),
        "packed_layout": share.layout,
        "sequence_parallel": parallel,
        "use_cache": False,
    }


def check_heads(size: int, heads: int, key_heads: int) -> None:
    """Raises ConfigError when the attention heads of a model cannot be shared by so many ranks."""
    if heads % size or (key_heads % size and size % key_heads):
        raise ConfigError(
            f"training.sequence_parallel_size={size} cannot share the model's {heads} attention heads and {key_heads} "
            f"key-value heads equally; take a size that divides both, or divides the first and is a multiple of the "
            f"second"
        )


def share_of_row(row: PackedRow, parallel: SequenceParallel) -> RowShare:
    """This rank's share of a row. The device is not waited for."""
    width = -(-row.columns // parallel.size)
    first = parallel.rank * width
    own = slice(first, first + width)
    padding = width * parallel.size - row.columns
    layout, input_ids, position_ids = row.layout, row.input_ids, row.position_ids
    if padding:
        # A prompt of its own, which nothing else sees.
        layout = (*layout, PackedPrompt(row.columns, padding, ()))
        input_ids = torch.cat([input_ids, input_ids.new_zeros(1, padding)], dim=1)
        position_ids = torch.cat([position_ids, torch.arange(padding, device=position_ids.device)[None]], dim=1)
    own_targets = _targets_between(row.layout, first, first + width).to(input_ids.device, non_blocking=True)
    return RowShare(layout, input_ids[:, own], position_ids[:, own], row.predicting[own_targets] - first, own_targets)


def _targets_between(layout: tuple[PackedPrompt, ...], first: int, stop: int) -> Tensor:
    """The indexes of the targets of a row that the columns [first, stop) predict."""
    own: list[Tensor] = []
    count = 0
    for one in layout:
        last = one.start + one.tokens - 1
        for start, columns in zip(one.response_starts(), one.responses, strict=True):
            if first <= last < stop:  # the prompt's last column predicts the first token
                own.append(torch.tensor([count]))
            low, high = max(first, start), min(stop, start + columns)
            own.append(torch.arange(count + 1 + low - start, count + 1 + max(low, high) - start))
            count += 1 + columns
    return torch.cat(own) if own else torch.empty(0, dtype=torch.int64)


def attend_together(
    parallel: SequenceParallel,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> Tensor:
    """Attention whose columns are shared by the ranks. All ranks of the process group call it together.

    Args:
        attend: attention over all columns for some heads: takes [1, heads, columns, width] three times and returns
            [1, columns, heads, width].
        query, key, value: [1, heads, own columns, width].

    Returns:
        [1, own columns, heads, width].
    """
    from deepspeed.sequence.layer import DistributedAttention

    if key.shape[1] < parallel.size:
        copies = parallel.size // key.shape[1]
        key, value = key.repeat_interleave(copies, dim=1), value.repeat_interleave(copies, dim=1)

    def attend_to_all(*tensors: Tensor) -> Tensor:
        query, key, value = (tensor.transpose(1, 2) for tensor in tensors)
        return attend(query, key, value)

    distributed = DistributedAttention(attend_to_all, parallel.process_group, scatter_idx=2, gather_idx=1)
    out: Tensor = distributed(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), 0)
    return out


def collect(parallel: SequenceParallel, own: Tensor, own_targets: Tensor, targets: int) -> Tensor:
    """The values of all targets, [targets], from those of each rank, differentiable.

    All ranks of the process group call it together, and compute the same of what it returns. So the derivative of that
    with respect to this rank's values is already whole on this rank, and nothing is sent in the backward pass.

    Args:
        own: [own targets].
    """
    collected: Any = _Collect.apply  # type: ignore[no-untyped-call]
    values: Tensor = collected(own.new_zeros(targets).index_copy(0, own_targets, own), parallel.process_group)
    return values


class _Collect(torch.autograd.Function):
    """The sum over the ranks; the derivative passes as it is."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, process_group: Any) -> Tensor:
        summed = values.clone()
        dist.all_reduce(summed, group=process_group)
        return summed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
