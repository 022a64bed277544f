"""Turns groups into tensors.

Prompts are padded on the left and responses on the right, so the responses of all rows begin in the same column.
Invariant: the score of a row does not depend on the other rows; padding is not counted, and no token attends to it
(`training.padding` says what padding itself attends to).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from aft_ray.objectives import Objective
from aft_ray.storage.records import Group, Verdict
from aft_ray.training.batching import trained_candidates

REFERENCE, DUMMY = -1, -2  # values of `Batch.slot_of_row` for rows that are not a candidate


@dataclass(frozen=True)
class Batch:
    """One micro-batch. For each group it has a row for the reference response and one for each trained candidate.

    Attributes:
        question_ids: one of each group.
        input_ids, attention_mask, position_ids: [rows, prompt columns + response columns] int64.
        response_mask: [rows, response columns] bool, True for response tokens.
        group_of_row: [rows], index into `question_ids`.
        slot_of_row: [rows], index of the candidate in its group, or REFERENCE, or DUMMY.
        rewards, sampler_scores: [groups, k] float32, zero for candidates without a row. k is at least 1.
        correct: [groups, k] bool, True where the candidate has a row and a right answer.
        mask: [groups, k] bool, True where the candidate has a row.
    """

    question_ids: tuple[str, ...]
    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    response_mask: Tensor
    group_of_row: Tensor
    slot_of_row: Tensor
    rewards: Tensor
    correct: Tensor
    sampler_scores: Tensor
    mask: Tensor

    @property
    def response_columns(self) -> int:
        return self.response_mask.shape[1]

    def to(self, device: torch.device) -> Self:
        """The same batch on another device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "question_ids"}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


def collate(groups: Sequence[Group], objective: Objective, pad_token_id: int) -> Batch:
    """The batch of some groups with the candidates that the objective trains on.

    Without groups it has a single DUMMY row of two tokens that belongs to no group and adds exactly zero to the loss.
    """
    rows: list[tuple[list[int], list[int], int, int]] = []  # prompt, response, group, slot
    k = max([1, *(len(group.candidates) for group in groups)])
    rewards, sampler_scores = torch.zeros(len(groups), k), torch.zeros(len(groups), k)
    correct, mask = torch.zeros(len(groups), k, dtype=torch.bool), torch.zeros(len(groups), k, dtype=torch.bool)
    for index, group in enumerate(groups):
        rows.append((group.prompt_token_ids, group.reference_token_ids, index, REFERENCE))
        for slot in trained_candidates(group, objective):
            candidate = group.candidates[slot]
            rows.append((group.prompt_token_ids, candidate.token_ids, index, slot))
            rewards[index, slot], sampler_scores[index, slot] = candidate.reward, candidate.score
            correct[index, slot], mask[index, slot] = candidate.verdict is Verdict.RIGHT, True
    if not rows:
        rows.append(([pad_token_id], [pad_token_id], 0, DUMMY))

    prompt_columns = max(len(prompt) for prompt, *_ in rows)
    response_columns = max(len(response) for _, response, *_ in rows)
    input_ids = torch.full((len(rows), prompt_columns + response_columns), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, (prompt, response, _, _) in enumerate(rows):
        columns = slice(prompt_columns - len(prompt), prompt_columns + len(response))
        input_ids[row, columns] = torch.tensor(prompt + response)
        attention_mask[row, columns] = 1
    return Batch(
        question_ids=tuple(group.question.id for group in groups),
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(dim=1) - 1).clamp(min=0),
        response_mask=attention_mask[:, prompt_columns:].bool(),
        group_of_row=torch.tensor([group for *_, group, _ in rows]),
        slot_of_row=torch.tensor([slot for *_, slot in rows]),
        rewards=rewards,
        correct=correct,
        sampler_scores=sampler_scores,
        mask=mask,
    )
