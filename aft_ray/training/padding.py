"""The attention mask of padded rows: padding attends to itself.

transformers masks padding out of every row of the mask, its own rows too. A query that attends to nothing has no
softmax, and some CUDA kernels then return NaN gradients for the keys of its sequence. Invariants: no row of a mask is
empty; a token attends to the same tokens as before, since only the diagonal changes, which it attends to anyway.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def padding_mask(*arguments: Any, **options: Any) -> Tensor | None:
    """transformers' mask for `attn_implementation="sdpa"`, with a full diagonal. Takes the same arguments.

    Returns:
        A [rows, 1, columns, columns] bool tensor, True where a query attends to a key; None for plain causal attention.
    """
    from transformers.masking_utils import sdpa_mask

    mask: Tensor | None = sdpa_mask(*arguments, **options)
    # Without padding nothing is empty, and the mask may be an expanded view, which cannot be written to.
    if mask is None or options.get("attention_mask") is None:
        return mask
    mask.diagonal(dim1=-2, dim2=-1).fill_(True)
    return mask


def use_padding_mask() -> None:
    """Makes every model of this process that is loaded with `attn_implementation="sdpa"` use `padding_mask`."""
    from transformers import AttentionMaskInterface

    AttentionMaskInterface.register("sdpa", padding_mask)
