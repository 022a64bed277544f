"""The plan of a training pass: which groups each rank runs in each forward pass of each optimiser step.

A pure function of the groups' sizes and ids, the seed, the round and the settings, so every rank computes the same plan
without talking. Invariants: groups stay whole; each is trained exactly once per epoch; in a step every rank runs the
same number of micro-batches (empty ones fill up), because sharded weights are gathered by all ranks in every pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from aft_ray.objectives import Objective
from aft_ray.storage.records import Group, Verdict

MicroBatch = tuple[int, ...]  # indexes into the sequence of sizes that was planned; empty: a dummy pass


class BatchingError(ValueError):
    """Groups that cannot be trained on. The message names the question."""


@dataclass(frozen=True, slots=True)
class GroupSize:
    """What a group costs. rows: its reference and trained candidates; lengths in tokens, the longest of its rows.

    reference_tokens: of its reference response. supervised_tokens: of all its rows, what `rft` divides by.
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
    """What the losses of one optimiser step are divided by, over all ranks and micro-batches."""

    groups: int
    reference_tokens: int
    supervised_tokens: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One optimiser step: `shares[rank]` is the micro-batches of that rank, equally many for every rank."""

    shares: tuple[tuple[MicroBatch, ...], ...]
    totals: StepTotals


def training_mask(group: Group) -> list[bool]:
    """Which candidates may be trained on: labelled, not empty, and the first of those with the same tokens.

    A response that was sampled twice must not weigh double, neither as right nor as wrong.
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
    """Indexes of the candidates that the objective's loss depends on; the others are not run through the model.

    A ranking objective has no use for a group whose candidates are all of one reward. `rft` takes the right ones that
    do not repeat the reference.
    """
    if not objective.uses_candidates:
        return []
    kept = [index for index, keep in enumerate(training_mask(group)) if keep]
    if objective.right_candidates_only:
        reference = group.reference_token_ids
        chosen = [group.candidates[index] for index in kept]
        return [i for i, c in zip(kept, chosen, strict=True) if c.verdict is Verdict.RIGHT and c.token_ids != reference]
    if objective.ranks_candidates and len({group.candidates[index].reward for index in kept}) < 2:
        return []
    return kept


def group_size(group: Group, objective: Objective) -> GroupSize:
    """The size of a group under an objective. Raises BatchingError for an empty prompt or reference response."""
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
    """The steps of each epoch. The order of groups depends on (seed, round, epoch) and the ids, not on input order.

    The last step of an epoch may be smaller. A micro-batch holds at most `tokens_per_microbatch` padded tokens, or a
    single group. Raises BatchingError when an id occurs twice.
    """
    ids = {size.question_id for size in sizes}
    if len(ids) < len(sizes):
        raise BatchingError(f"{len(sizes) - len(ids)} groups of round {round} repeat a question")

    def place(index: int, epoch: int) -> bytes:
        return hashlib.sha256(f"{seed}\0{round}\0{epoch}\0{sizes[index].question_id}".encode()).digest()

    epochs_planned = []
    for epoch in range(epochs):
        order = sorted(range(len(sizes)), key=lambda index: place(index, epoch))
        steps = [order[start : start + groups_per_step] for start in range(0, len(order), groups_per_step)]
        epochs_planned.append([_plan_step(sizes, step, ranks, tokens_per_microbatch) for step in steps])
    return epochs_planned


def steps_of(questions: int, groups_per_step: int, epochs: int) -> int:
    """Optimiser steps of a pass over so many questions."""
    return -(-questions // groups_per_step) * epochs


def _plan_step(sizes: Sequence[GroupSize], step: list[int], ranks: int, budget: int) -> StepPlan:
    longest_first = sorted(step, key=lambda index: (-sizes[index].padded, sizes[index].question_id))
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for index in longest_first:
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
    """Neighbours in length go together, so that little is padding."""
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
