"""Packs responses into one row of tokens in which each prompt stands once.

A row is the input of one forward pass. It has no padding. For each prompt it has the tokens of the prompt, then those
of each response:

    [prompt][response 0][response 1] ... [prompt of another group][response 0] ...

The positions of every response continue those of its prompt, so a response token sees what it would see in a row of its
own: its prompt and its own past (`training.forward.packed_attention`). The last token of a response predicts nothing
that is scored, so it is a target and not part of the row.

Invariant: the score of a response does not depend on what else is in the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PackedPrompt:
    """Where one prompt and its responses stand in a row.

    Attributes:
        start: first column of the prompt.
        tokens: tokens of the prompt, at least 1.
        responses: columns of each response, in order and without gaps behind the prompt: all tokens but the last, so a
            response of one token has none.
    """

    start: int
    tokens: int
    responses: tuple[int, ...]

    @property
    def stop(self) -> int:
        """The first column behind the last response."""
        return self.start + self.tokens + sum(self.responses)

    def response_starts(self) -> list[int]:
        """The first column of each response; of one without columns, where it would be."""
        return list(accumulate(self.responses, initial=self.start + self.tokens))[:-1]


@dataclass(frozen=True)
class PackedRow:
    """The input of one forward pass and what it predicts. Responses are numbered through all prompts of the row.

    Attributes:
        layout: the prompts of the row, from left to right, without gaps.
        input_ids, position_ids: [1, columns] int64.
        predicting: [targets] int64, the column whose hidden state predicts a target.
        targets: [targets] int64, the tokens of all responses, one response after the other.
        response_of_target: [targets] int64, the response that a target belongs to.
        lengths: [responses] int64, tokens of each response, at least 1.
    """

    layout: tuple[PackedPrompt, ...]
    input_ids: Tensor
    position_ids: Tensor
    predicting: Tensor
    targets: Tensor
    response_of_target: Tensor
    lengths: Tensor

    @property
    def columns(self) -> int:
        """Tokens that the forward pass computes."""
        return self.input_ids.shape[1]

    @property
    def responses(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device) -> Self:
        """The same row on another device. The copy does not wait for the device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "layout"}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


def pack(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[Sequence[int]]]) -> PackedRow:
    """The row of some prompts with their responses.

    Args:
        prompts: token ids of each prompt, at least one prompt and one token each.
        responses: for each prompt the token ids of its responses, at least one token each.
    """
    layout: list[PackedPrompt] = []
    input_ids: list[int] = []
    position_ids: list[int] = []
    predicting: list[int] = []
    targets: list[int] = []
    lengths: list[int] = []
    for prompt, of_prompt in zip(prompts, responses, strict=True):
        start, tokens = len(input_ids), len(prompt)
        layout.append(PackedPrompt(start, tokens, tuple(len(response) - 1 for response in of_prompt)))
        input_ids += prompt
        position_ids += range(tokens)
        for response in of_prompt:
            first = len(input_ids)
            predicting += [start + tokens - 1, *range(first, first + len(response) - 1)]
            targets += response
            lengths.append(len(response))
            input_ids += response[:-1]
            position_ids += range(tokens, tokens + len(response) - 1)
    counts = torch.tensor(lengths, dtype=torch.int64)
    return PackedRow(
        layout=tuple(layout),
        input_ids=torch.tensor([input_ids]),
        position_ids=torch.tensor([position_ids]),
        predicting=torch.tensor(predicting, dtype=torch.int64),
        targets=torch.tensor(targets, dtype=torch.int64),
        response_of_target=torch.arange(len(lengths)).repeat_interleave(counts),
        lengths=counts,
    )


def empty_row(token_id: int) -> PackedRow:
    """A row of one token and without responses: what a rank computes that has less to do than the others.

    With ZeRO-3 all ranks gather the sharded weights together, so all of them make the same number of forward passes.
    """
    return pack([[token_id]], [[]])
