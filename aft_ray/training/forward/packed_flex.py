"""FlexAttention over packed rows, for CUDA: the mask function of a row, its block mask, and the kernel.

It has not run on a GPU yet. The tests compare its masks with dense ones on the CPU, where it also runs uncompiled,
without gradients. Invariants: nothing has the size of the dense mask in memory; nothing is kept between calls but the
compiled kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aft_ray.training.forward.packing import PackedPrompt

Layout = tuple[PackedPrompt, ...]
# (batch, head, position of the query, position of the key) -> whether the query sees the key. The arguments broadcast.
MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# Columns of one of FlexAttention's blocks. A shorter row, such as that of a rank with nothing to do, is computed
# without it: FlexAttention has another kernel for such rows, which would be compiled, too.
BLOCK = 128
# Elements of a dense mask that are in memory at once while FlexAttention's block mask is made.
_STRIP_ELEMENTS = 1 << 24


def mask_mod(layout: Layout, mask: MaskFunction | None, device: torch.device) -> MaskFunction:
    """FlexAttention's mask function of a row: whether the query of one column sees the key of another."""
    group: list[int] = []
    segment: list[int] = []
    position: list[int] = []
    for index, one in enumerate(layout):
        for number, columns in enumerate((one.tokens, *one.responses)):
            first = one.tokens if number else 0
            group += [index] * columns
            segment += [number] * columns
            position += range(first, first + columns)
    # Number 0 is the prompt, which all tokens of its group see.
    groups, segments, positions = torch.tensor([group, segment, position], dtype=torch.int32).to(
        device, non_blocking=True
    )

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        of_key = segments[key]
        related = (groups[query] == groups[key]) & ((of_key == 0) | (of_key == segments[query]))
        at_query, at_key = positions[query], positions[key]
        seen: Tensor = related & (at_key <= at_query if mask is None else mask(batch, head, at_query, at_key))
        return seen

    return sees


def block_mask(
    layout: Layout, mask: MaskFunction | None, device: torch.device, strip_elements: int = _STRIP_ELEMENTS
) -> Any:
    """FlexAttention's block mask of a row.

    Args:
        strip_elements: most elements of the dense mask that are in memory at once, but for one row of blocks.
    """
    from torch.nn.attention.flex_attention import BlockMask

    sees = mask_mod(layout, mask, device)
    columns = layout[-1].stop
    blocks = -(-columns // BLOCK)
    keys, zero = torch.arange(columns, device=device), torch.zeros((), dtype=torch.int64, device=device)
    height = max(1, strip_elements // (columns * BLOCK)) * BLOCK
    counts = []
    for first in range(0, columns, height):
        queries = keys[first : first + height]
        seen = sees(zero, zero, queries[:, None], keys)
        seen = F.pad(seen, (0, blocks * BLOCK - columns, 0, -len(queries) % BLOCK))
        counts.append(seen.view(-1, BLOCK, blocks, BLOCK).sum(dim=(1, 3)))
    count = torch.cat(counts)[None, None]  # pairs that are seen, [1, 1, blocks of queries, blocks of keys]
    full = count == BLOCK**2
    return BlockMask.from_kv_blocks(
        *_chosen_first((count > 0) & ~full),
        *_chosen_first(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(columns, columns),
    )


def _chosen_first(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of blocks the number of those chosen, and the indexes of all, the chosen ones first; int32."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(dim=-1, dtype=torch.int32), order.int()


def flex(query: Tensor, key: Tensor, value: Tensor, blocks: Any, scaling: float, softcap: float | None) -> Tensor:
    """FlexAttention of a row. Returns [1, heads, columns, width]."""
    from torch.nn.attention.flex_attention import flex_attention

    attend: Any = _compiled_flex_attention() if query.is_cuda else flex_attention
    out: Tensor = attend(
        query,
        key,
        value,
        score_mod=None if softcap is None else _cap(softcap),
        block_mask=blocks,
        scale=scaling,
        enable_gqa=True,
    )
    return out


def _cap(softcap: float) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


@functools.cache
def _compiled_flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # It is compiled for each kind of mask, with and without gradients, first for one number of columns, then for any.
    # Beyond the limit, which is 8, it would run uncompiled, and then it has all scores of a row in memory. With
    # dynamic=True the size of a window would be symbolic, and the mask functions of transformers could not be traced.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention)
