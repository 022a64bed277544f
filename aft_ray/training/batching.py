"""The plan of an optimiser step: which groups each rank computes in which forward pass.

A plan is a pure function of the sizes of the step's groups and of the settings, so every rank makes the same plan
without communication, one step at a time. Invariants:

- each group of the step is trained exactly once; no forward pass has more tokens than the budget
- every rank makes the same number of passes, because with ZeRO-3 all ranks gather the sharded weights together; a rank
  with less to do makes passes without groups
- a group that is larger than the budget is split into pieces of its responses, each with the prompt; the ranks first
  compute the scores of all pieces without gradients (`training.step`)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from aft_ray.storage.records import Group, Verdict, training_mask
from aft_ray.training.balance import Load, Spread, load_of, spread_packed, spread_padded

if TYPE_CHECKING:  # the objectives import torch, and planning uses this module without it
    from aft_ray.objectives import Objective


class BatchingError(ValueError):
    """Groups that cannot be trained on. The message names the question."""


@dataclass(frozen=True, slots=True)
class GroupSize:
    """The size of a group as it is trained on.

    Attributes:
        prompt: tokens of the prompt.
        responses: tokens of each distinct response that is trained on; the first is the reference.
    """

    question_id: str
    prompt: int
    responses: tuple[int, ...]

    @property
    def reference_tokens(self) -> int:
        """Tokens of the reference response."""
        return self.responses[0]

    @property
    def supervised_tokens(self) -> int:
        """Tokens of all responses. `rft` divides by it."""
        return sum(self.responses)


@dataclass(frozen=True, slots=True)
class TrainedResponses:
    """The distinct responses of a group that are run through the model.

    Attributes:
        token_ids: the reference response, and then every other.
        slots: candidate -> the index of its response. Two candidates never share one, but a candidate with the tokens
            of the reference response shares that one: it is computed once.
    """

    token_ids: tuple[Sequence[int], ...]
    slots: dict[int, int]


@dataclass(frozen=True, slots=True)
class StepTotals:
    """What the losses of one optimiser step are divided by: counts over all its ranks and passes."""

    groups: int
    reference_tokens: int
    supervised_tokens: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Some responses of a group that is split over several passes, which may be of several ranks.

    Attributes:
        responses: their indexes in the group.
        first: where the responses of the group begin among those of all split groups of the step.
        counted: whether the step's measurements take the group from this piece; true for one of its pieces.
    """

    responses: tuple[int, ...]
    first: int
    counted: bool


@dataclass(frozen=True, slots=True)
class PlannedBatch:
    """What a rank computes in one pass: some whole groups, or a piece of one.

    Attributes:
        groups: indexes into the sizes of the step.
    """

    groups: tuple[int, ...]
    piece: Piece | None = None


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One optimiser step.

    Attributes:
        shares: the batches of each rank, in the order in which they are computed; pieces come first.
        train_passes: forward and backward passes of every rank.
        score_passes: forward passes of every rank before them, which compute the scores of the pieces.
        split_responses: responses of all groups that are split.
        totals: counts over the whole step.
    """

    shares: tuple[tuple[PlannedBatch, ...], ...]
    train_passes: int
    score_passes: int
    split_responses: int
    totals: StepTotals


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


def trained_responses(group: Group, objective: Objective) -> TrainedResponses:
    """The distinct responses that a group is trained on under an objective, and which candidate has which."""
    token_ids: list[Sequence[int]] = [group.reference_token_ids]
    slots = {}
    for slot in trained_candidates(group, objective):
        ids = group.candidates[slot].token_ids
        if ids == group.reference_token_ids:
            slots[slot] = 0
        else:
            slots[slot] = len(token_ids)
            token_ids.append(ids)
    return TrainedResponses(tuple(token_ids), slots)


def group_size(group: Group, objective: Objective) -> GroupSize:
    """The size of a group under an objective. Raises BatchingError if the prompt or the reference response is empty."""
    if not group.prompt_token_ids or not group.reference_token_ids:
        part = "reference response" if group.prompt_token_ids else "prompt"
        raise BatchingError(f"question {group.question.id!r} has an empty {part}, so it cannot be trained on")
    lengths = tuple(len(ids) for ids in trained_responses(group, objective).token_ids)
    return GroupSize(group.question.id, len(group.prompt_token_ids), lengths)


def training_order(question_ids: Sequence[str], seed: int, round: int, epoch: int) -> np.ndarray:
    """The order in which the questions of a round are trained on: indexes into `question_ids`, int64.

    It depends on the ids, and not on their order. It takes 16 bytes a question beside the ids.

    Raises:
        BatchingError: a question id occurs twice.
    """
    prefix = hashlib.sha256(f"{seed}\0{round}\0{epoch}\0".encode())

    def key(question_id: str) -> int:
        digest = prefix.copy()
        digest.update(question_id.encode())
        return int.from_bytes(digest.digest()[:8], "big")

    keys = np.fromiter(map(key, question_ids), dtype=np.uint64, count=len(question_ids))
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    equal = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(equal):  # equal ids, or by the rarest of chances two ids with equal keys
        repeated = len(question_ids) - len(set(question_ids))
        if repeated:
            raise BatchingError(f"{repeated} groups of round {round} repeat a question")
        order = np.array(sorted(range(len(question_ids)), key=lambda index: (keys[index], question_ids[index])))
    return order


def count_steps(questions: int, groups_per_step: int, epochs: int) -> int:
    """Optimiser steps of `epochs` passes over so many questions."""
    return -(-questions // groups_per_step) * epochs


def plan_step(sizes: Sequence[GroupSize], *, ranks: int, budget: int, prompts_shared: bool = True) -> StepPlan:
    """The plan of one optimiser step: the fewest passes that hold its groups, and in them equal work for all ranks.

    Args:
        sizes: those of the step's groups, at least one.
        budget: most tokens of a forward pass.
        prompts_shared: a group's prompt is computed once. If False, each response has a row with the prompt of its own,
            and all rows of a pass are as long as the longest.

    Raises:
        BatchingError: a prompt with one response is longer than the budget.
    """
    spread: Spread = spread_packed if prompts_shared else spread_padded
    whole: list[tuple[int, Load]] = []
    pieces: list[tuple[int, tuple[int, ...], Load]] = []
    for index, size in enumerate(sizes):
        load = load_of(size.prompt, size.responses)
        if spread([load], 1, budget) is not None:
            whole.append((index, load))
            continue
        for responses in _split(size, budget, prompts_shared):
            pieces.append((index, responses, load_of(size.prompt, [size.responses[one] for one in responses])))
    passes = -(-len(pieces) // ranks) or 1
    loads = [load for _, load in whole]
    while (members := spread(loads, ranks * passes - len(pieces), budget)) is None:
        passes += 1
    split = list(dict.fromkeys(index for index, *_ in pieces))
    firsts = dict(zip(split, accumulate((len(sizes[index].responses) for index in split), initial=0), strict=False))
    batches = [
        (load.work, PlannedBatch((index,), Piece(responses, firsts[index], counted=0 in responses)))
        for index, responses, load in sorted(pieces, key=lambda one: (-one[2].work, one[:2]))
    ]
    filled = [(sum(loads[i].work for i in one), tuple(whole[i][0] for i in one)) for one in members]
    batches += [(work, PlannedBatch(groups)) for work, groups in sorted(filled, key=lambda one: (-one[0], one[1]))]
    return StepPlan(
        shares=_assign(batches, ranks),
        train_passes=passes,
        score_passes=-(-len(pieces) // ranks),
        split_responses=sum(len(sizes[index].responses) for index in split),
        totals=StepTotals(
            groups=len(sizes),
            reference_tokens=sum(size.reference_tokens for size in sizes),
            supervised_tokens=sum(size.supervised_tokens for size in sizes),
        ),
    )


def _split(size: GroupSize, budget: int, prompts_shared: bool) -> list[tuple[int, ...]]:
    """The responses of each piece of a group: the fewest pieces that fit, of equal work."""
    prompt = 0 if prompts_shared else size.prompt
    capacity = budget - size.prompt if prompts_shared else budget
    spread: Spread = spread_packed if prompts_shared else spread_padded
    loads = [load_of(prompt, [response]) for response in size.responses]
    for count in range(1, len(loads) + 1):
        members = spread(loads, count, capacity)
        if members is not None:
            return [tuple(sorted(one)) for one in members]
    raise BatchingError(
        f"question {size.question_id!r} has a prompt and a response of {size.prompt + max(size.responses)} tokens "
        f"together, more than training.tokens_per_microbatch={budget}; raise that key"
    )


def _assign(batches: Sequence[tuple[int, PlannedBatch]], ranks: int) -> tuple[tuple[PlannedBatch, ...], ...]:
    """The batches of each rank. Passes take them in the given order, and in a pass the heaviest goes where least is.

    Args:
        batches: work and batch, as many as ranks times passes.
    """
    shares: list[list[PlannedBatch]] = [[] for _ in range(ranks)]
    sums = [0] * ranks
    for start in range(0, len(batches), ranks):
        of_pass = sorted(batches[start : start + ranks], key=lambda one: -one[0])
        lightest_first = sorted(range(ranks), key=lambda rank: (sums[rank], rank))
        for rank, (work, batch) in zip(lightest_first, of_pass, strict=True):
            sums[rank] += work
            if batch.groups:
                shares[rank].append(batch)
    return tuple(map(tuple, shares))
