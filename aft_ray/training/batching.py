"""The plan of a training pass: which groups each rank runs in each forward pass of each optimiser step.

The plan is a pure function of the groups' sizes and ids, the seed, the round and the settings, so every rank computes
the same plan without communication. Invariants: a group is never split; each group is trained exactly once in an epoch;
within a step every rank runs the same number of micro-batches, some of them empty if necessary, because with ZeRO-3 all
ranks gather the sharded weights together in every forward pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aft_ray.storage.records import Group, Verdict

if TYPE_CHECKING:  # the objectives import torch, and planning uses this module without it
    from aft_ray.objectives import Objective

MicroBatch = tuple[int, ...]  # indexes into the planned sequence of sizes; empty for a pass without groups


class BatchingError(ValueError):
    """Groups that cannot be trained on. The message names the question."""


@dataclass(frozen=True, slots=True)
class GroupSize:
    """The size of a group as it is trained on: its reference response and its trained candidates, one row each.

    Attributes:
        rows: number of rows.
        prompt: tokens of the prompt.
        response: tokens of the longest response among the rows.
        reference_tokens: tokens of the reference response.
        supervised_tokens: tokens of the responses of all rows. `rft` divides by it.
    """

    question_id: str
    rows: int
    prompt: int
    response: int
    reference_tokens: int
    supervised_tokens: int

    @property
    def padded(self) -> int:
        """Tokens of the group alone in a batch, padding included."""
        return self.rows * (self.prompt + self.response)


@dataclass(frozen=True, slots=True)
class StepTotals:
    """What the losses of one optimiser step are divided by: counts over all its ranks and micro-batches."""

    groups: int
    reference_tokens: int
    supervised_tokens: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One optimiser step. `shares[rank]` are the micro-batches of a rank; every rank has the same number of them."""

    shares: tuple[tuple[MicroBatch, ...], ...]
    totals: StepTotals


def training_mask(group: Group) -> list[bool]:
    """Which candidates may be trained on, one entry per candidate.

    Left out are candidates with an undecided verdict, without tokens, or with the tokens of an earlier candidate: a
    response that was sampled twice must not count double.
    """
    seen: set[tuple[int, ...]] = set()
    mask = []
    for candidate in group.candidates:
        tokens = tuple(candidate.token_ids)
        mask.append(bool(tokens) and candidate.verdict is not Verdict.UNDECIDED and tokens not in seen)
        if mask[-1]:
            seen.add(tokens)
    return mask


def trained_candidates(group: Group, objective: Objective) -> list[int]:
    """Indexes of the candidates that the objective's loss depends on. The others are not run through the model.

    An objective that ranks needs no candidate of a group in which all rewards are equal. One that reads right
    candidates only takes those that do not repeat the reference response.
    """
    if not objective.uses_candidates:
        return []
    kept = [index for index, keep in enumerate(training_mask(group)) if keep]
    if objective.right_candidates_only:
        candidates, reference = group.candidates, group.reference_token_ids
        kept = [i for i in kept if candidates[i].verdict is Verdict.RIGHT and candidates[i].token_ids != reference]
    if objective.ranks_candidates and len({group.candidates[index].reward for index in kept}) < 2:
        return []
    return kept


def group_size(group: Group, objective: Objective) -> GroupSize:
    """The size of a group under an objective. Raises BatchingError if the prompt or the reference response is empty."""
    if not group.prompt_token_ids or not group.reference_token_ids:
        part = "reference response" if group.prompt_token_ids else "prompt"
        raise BatchingError(f"question {group.question.id!r} has an empty {part}, so it cannot be trained on")
    reference = len(group.reference_token_ids)
    lengths = [reference] + [len(group.candidates[i].token_ids) for i in trained_candidates(group, objective)]
    return GroupSize(
        question_id=group.question.id,
        rows=len(lengths),
        prompt=len(group.prompt_token_ids),
        response=max(lengths),
        reference_tokens=reference,
        supervised_tokens=sum(lengths),
    )


def plan_pass(
    sizes: Sequence[GroupSize],
    *,
    ranks: int,
    groups_per_step: int,
    tokens_per_microbatch: int,
    epochs: int,
    seed: int,
    round: int,
) -> list[list[StepPlan]]:
    """The optimiser steps of each epoch.

    The order of the groups depends on (seed, round, epoch) and on their ids, and not on the order of `sizes`. The last
    step of an epoch may have fewer groups. A micro-batch has at most `tokens_per_microbatch` padded tokens, or a single
    group.

    Raises:
        BatchingError: a question id occurs twice.
    """
    ids = {size.question_id for size in sizes}
    if len(ids) < len(sizes):
        raise BatchingError(f"{len(sizes) - len(ids)} groups of round {round} repeat a question")

    def sort_key(index: int, epoch: int) -> bytes:
        return hashlib.sha256(f"{seed}\0{round}\0{epoch}\0{sizes[index].question_id}".encode()).digest()

    planned_epochs = []
    for epoch in range(epochs):
        order = sorted(range(len(sizes)), key=lambda index: sort_key(index, epoch))
        steps = [order[start : start + groups_per_step] for start in range(0, len(order), groups_per_step)]
        planned_epochs.append([_plan_step(sizes, step, ranks, tokens_per_microbatch) for step in steps])
    return planned_epochs


def count_steps(questions: int, groups_per_step: int, epochs: int) -> int:
    """Optimiser steps of `epochs` passes over so many questions."""
    return -(-questions // groups_per_step) * epochs


def _plan_step(sizes: Sequence[GroupSize], step: list[int], ranks: int, budget: int) -> StepPlan:
    """Distributes the groups of a step over the ranks: the largest first, each to the rank with the least tokens.

    Args:
        step: indexes into `sizes`.
        budget: padded tokens of a micro-batch at most.
    """
    largest_first = sorted(step, key=lambda index: (-sizes[index].padded, sizes[index].question_id))
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for index in largest_first:
        rank = loads.index(min(loads))
        shares[rank].append(index)
        loads[rank] += sizes[index].padded
    packed = [_pack(sizes, share, budget) for share in shares]
    passes = max(len(batches) for batches in packed)
    return StepPlan(
        shares=tuple(tuple(batches + [()] * (passes - len(batches))) for batches in packed),
        totals=StepTotals(
            groups=len(step),
            reference_tokens=sum(sizes[index].reference_tokens for index in step),
            supervised_tokens=sum(sizes[index].supervised_tokens for index in step),
        ),
    )


def _pack(sizes: Sequence[GroupSize], share: list[int], budget: int) -> list[MicroBatch]:
    """Packs the groups of one rank into micro-batches. Groups of similar length share one, so little is padding."""
    batches: list[MicroBatch] = []
    current: list[int] = []
    rows = prompt = response = 0
    by_length = sorted(share, key=lambda i: (-(sizes[i].prompt + sizes[i].response), sizes[i].question_id))
    for index in by_length:
        size = sizes[index]
        rows, prompt, response = rows + size.rows, max(prompt, size.prompt), max(response, size.response)
        if current and rows * (prompt + response) > budget:
            batches.append(tuple(current))
            current, rows, prompt, response = [], size.rows, size.prompt, size.response
        current.append(index)
    return [*batches, tuple(current)] if current else batches
