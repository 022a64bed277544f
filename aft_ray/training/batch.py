"""Turns groups into the tensors of one pass: a packed row, and what the loss needs to know about its responses.

Invariant: a batch is a pass of `batching.plan_step`; its responses are numbered as `batching.trained_responses` does,
group after group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from aft_ray.objectives import Objective
from aft_ray.storage.records import Group, Verdict
from aft_ray.training.batching import Piece, PlannedBatch, trained_responses
from aft_ray.training.forward.packing import PackedRow, pack


@dataclass(frozen=True)
class Batch:
    """One pass of a rank: some whole groups, or a piece of one group.

    The tensors beside `row` describe all responses of the groups, also those of a split group that are in other passes.

    Attributes:
        question_ids: one of each group.
        row: what the forward pass computes.
        piece: which part of a split group the row has; None if it has all responses of all groups.
        row_responses: [responses of the row] int64, the index of each among all responses of the groups.
        tokens: [responses] float32, the length of each response.
        references: [groups] int64, the index of each reference response.
        slots: [groups, k] int64, the index of each candidate's response; 0 where the mask is False. k is at least 1.
        mask: [groups, k] bool, True where the candidate is trained on.
        rewards, sampler_scores: [groups, k] float32, zero where the mask is False.
        correct: [groups, k] bool, True where the candidate is trained on and has a right answer.
    """

    question_ids: tuple[str, ...]
    row: PackedRow
    piece: Piece | None
    row_responses: Tensor
    tokens: Tensor
    references: Tensor
    slots: Tensor
    mask: Tensor
    rewards: Tensor
    sampler_scores: Tensor
    correct: Tensor

    def to(self, device: torch.device) -> Self:
        """The same batch on another device. The copy does not wait for the device."""
        moved: dict[str, Any] = {
            field.name: one.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(one := getattr(self, field.name), Tensor)
        }
        return replace(self, row=self.row.to(device), **moved)


def make_batch(groups: Sequence[Group], planned: PlannedBatch, objective: Objective) -> Batch:
    """The batch of a plan.

    Args:
        groups: those of the batch, at least one, in the order of `planned.groups`.
    """
    k = max([1, *(len(group.candidates) for group in groups)])
    rewards, sampler_scores = torch.zeros(len(groups), k), torch.zeros(len(groups), k)
    mask, correct = torch.zeros(len(groups), k, dtype=torch.bool), torch.zeros(len(groups), k, dtype=torch.bool)
    slots = torch.zeros(len(groups), k, dtype=torch.int64)
    responses: list[list[Sequence[int]]] = []
    references: list[int] = []
    count = 0
    for index, group in enumerate(groups):
        trained = trained_responses(group, objective)
        references.append(count)
        for slot, response in trained.slots.items():
            candidate = group.candidates[slot]
            slots[index, slot], mask[index, slot] = count + response, True
            rewards[index, slot], sampler_scores[index, slot] = candidate.reward, candidate.score
            correct[index, slot] = candidate.verdict is Verdict.RIGHT
        responses.append(list(trained.token_ids))
        count += len(trained.token_ids)
    piece = planned.piece
    return Batch(
        question_ids=tuple(group.question.id for group in groups),
        row=pack(
            [group.prompt_token_ids for group in groups],
            responses if piece is None else [[responses[0][one] for one in piece.responses]],
        ),
        piece=piece,
        row_responses=torch.arange(count) if piece is None else torch.tensor(piece.responses),
        tokens=torch.tensor([float(len(ids)) for of_group in responses for ids in of_group]),
        references=torch.tensor(references),
        slots=slots,
        mask=mask,
        rewards=rewards,
        sampler_scores=sampler_scores,
        correct=correct,
    )
