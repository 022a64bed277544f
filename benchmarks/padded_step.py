"""The training step before packed rows, frozen: what `training.py` compares the step of `aft_ray.training` with.

It is written down as it was, for the comparison alone, and is not to be improved. A micro-batch has one row for each
response, with the prompt repeated in each. Prompts are padded on the left and responses on the right to the longest of
the micro-batch. The logits of all response columns exist at once. Groups are given to the rank with the fewest padded
tokens and fill micro-batches in the order of their lengths; a rank with fewer micro-batches than another runs dummies.

Invariant: nothing here imports the modules that it is compared with (batching, batch, scoring, step).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aft_ray.config.run import TrainingConfig
from aft_ray.objectives import Objective, ScoredGroups, reference_nll
from aft_ray.storage.records import Group, Verdict

REFERENCE, DUMMY = -1, -2  # values of `PaddedBatch.slot_of_row` for rows that are not a candidate
MicroBatch = tuple[int, ...]  # indexes of groups; empty for a pass without groups


@dataclass(frozen=True, slots=True)
class PaddedSize:
    """The size of a group: a row for its reference response and one for each trained candidate."""

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
class PaddedTotals:
    """What the losses of a step are divided by."""

    groups: int
    reference_tokens: int
    supervised_tokens: int


@dataclass(frozen=True)
class PaddedBatch:
    """A micro-batch as tensors. `input_ids`: [rows, prompt columns + response columns]."""

    groups: int
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


@dataclass(frozen=True)
class PaddedStats:
    """What is compared of a step: its loss, and the norm of its gradient before clipping."""

    loss: float
    grad_norm: float


def trained_candidates(group: Group, objective: Objective) -> list[int]:
    """Indexes of the candidates that the objective's loss depends on."""
    if not objective.uses_candidates:
        return []
    seen: set[tuple[int, ...]] = set()
    kept = []
    for index, candidate in enumerate(group.candidates):
        tokens = tuple(candidate.token_ids)
        if tokens and candidate.verdict is not Verdict.UNDECIDED and tokens not in seen:
            seen.add(tokens)
            kept.append(index)
    if objective.right_candidates_only:
        candidates, reference = group.candidates, group.reference_token_ids
        kept = [i for i in kept if candidates[i].verdict is Verdict.RIGHT and candidates[i].token_ids != reference]
    if objective.ranks_candidates and len({group.candidates[index].reward for index in kept}) < 2:
        return []
    return kept


def padded_size(group: Group, objective: Objective) -> PaddedSize:
    """The size of a group under an objective."""
    reference = len(group.reference_token_ids)
    lengths = [reference] + [len(group.candidates[i].token_ids) for i in trained_candidates(group, objective)]
    return PaddedSize(
        question_id=group.question.id,
        rows=len(lengths),
        prompt=len(group.prompt_token_ids),
        response=max(lengths),
        reference_tokens=reference,
        supervised_tokens=sum(lengths),
    )


def plan_padded_step(sizes: Sequence[PaddedSize], ranks: int, budget: int) -> list[list[MicroBatch]]:
    """The micro-batches of each rank, equally many: the largest group first, to the rank with the fewest tokens.

    Args:
        budget: padded tokens of a micro-batch at most; a group above it is alone.
    """
    largest_first = sorted(range(len(sizes)), key=lambda index: (-sizes[index].padded, sizes[index].question_id))
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for index in largest_first:
        rank = loads.index(min(loads))
        shares[rank].append(index)
        loads[rank] += sizes[index].padded
    packed = [_fill(sizes, share, budget) for share in shares]
    passes = max(len(batches) for batches in packed)
    return [batches + [()] * (passes - len(batches)) for batches in packed]


def _fill(sizes: Sequence[PaddedSize], share: list[int], budget: int) -> list[MicroBatch]:
    batches: list[MicroBatch] = []
    current: list[int] = []
    rows = prompt = response = 0
    for index in sorted(share, key=lambda i: (-(sizes[i].prompt + sizes[i].response), sizes[i].question_id)):
        size = sizes[index]
        rows, prompt, response = rows + size.rows, max(prompt, size.prompt), max(response, size.response)
        if current and rows * (prompt + response) > budget:
            batches.append(tuple(current))
            current, rows, prompt, response = [], size.rows, size.prompt, size.response
        current.append(index)
    return [*batches, tuple(current)] if current else batches


def totals(sizes: Sequence[PaddedSize]) -> PaddedTotals:
    """The totals of a step."""
    return PaddedTotals(
        groups=len(sizes),
        reference_tokens=sum(size.reference_tokens for size in sizes),
        supervised_tokens=sum(size.supervised_tokens for size in sizes),
    )


def computed_tokens(sizes: Sequence[PaddedSize], batch: MicroBatch) -> int:
    """Tokens that the forward pass of a micro-batch computes, padding included."""
    chosen = [sizes[index] for index in batch]
    if not chosen:
        return 2
    rows = sum(size.rows for size in chosen)
    return rows * (max(size.prompt for size in chosen) + max(size.response for size in chosen))


def collate(groups: Sequence[Group], objective: Objective, pad_token_id: int) -> PaddedBatch:
    """The batch of some groups. Without groups it has a single dummy row of two tokens."""
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
    return PaddedBatch(
        groups=len(groups),
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


def padding_mask(*arguments: Any, **options: Any) -> Tensor | None:
    """transformers' mask for SDPA with a full diagonal, so that padding attends to itself."""
    from transformers.masking_utils import sdpa_mask

    mask: Tensor | None = sdpa_mask(*arguments, **options)
    if mask is None or options.get("attention_mask") is None:
        return mask
    mask.diagonal(dim1=-2, dim2=-1).fill_(True)
    return mask


def build_padded_engine(directory: Path, training: TrainingConfig) -> Any:
    """A DeepSpeed engine with AdamW on a model in float32, configured like the runs' engine."""
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from aft_ray.training.deepspeed_config import ds_config
    from aft_ray.training.deepspeed_import import import_deepspeed

    # The names of its own leave other models of the process as they are.
    AttentionInterface.register("padded_sdpa", sdpa_attention_forward)
    AttentionMaskInterface.register("padded_sdpa", padding_mask)
    module = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="padded_sdpa"
    ).train()
    deepspeed = import_deepspeed()
    with contextlib.redirect_stdout(sys.stderr):
        optimizer = torch.optim.AdamW(
            module.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
        )
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=ds_config(training, "float32"))
    return engine


def response_logprobs(model: Any, batch: PaddedBatch) -> tuple[Tensor, Tensor]:
    """The log-probability of each row's response, in nats, and its number of tokens: two tensors of shape [rows]."""
    columns = batch.response_mask.shape[1]
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        logits_to_keep=columns + 1,
        use_cache=False,
    ).logits[:, -columns - 1 : -1]
    mask = batch.response_mask
    targets = batch.input_ids[:, -columns:][mask]
    logprobs = -F.cross_entropy(logits[mask].float(), targets, reduction="none")
    sums = torch.zeros_like(mask, dtype=torch.float32).masked_scatter(mask, logprobs).sum(dim=1)
    return sums, mask.sum(dim=1).float()


def score_groups(model: Any, batch: PaddedBatch) -> ScoredGroups:
    """The groups of a batch with their scores under the model, differentiable."""
    sums, tokens = response_logprobs(model, batch)
    scores = sums / tokens
    reference = batch.slot_of_row == REFERENCE
    candidate = batch.slot_of_row >= 0
    position = (batch.group_of_row[candidate], batch.slot_of_row[candidate])
    empty = scores.new_zeros(batch.mask.shape)
    return ScoredGroups(
        scores=empty.index_put(position, scores[candidate]),
        rewards=batch.rewards,
        mask=batch.mask,
        correct=batch.correct,
        sampler_scores=batch.sampler_scores,
        tokens=empty.index_put(position, tokens[candidate]),
        reference_scores=scores[reference],
        reference_tokens=tokens[reference],
    )


def micro_loss(
    model: Any, batch: PaddedBatch, objective: Objective, weight: float, totals: PaddedTotals
) -> tuple[Tensor, Tensor]:
    """The share of one micro-batch in the loss of its step, and what was measured in it: [9] float64, detached."""
    groups = score_groups(model, batch)
    assert groups.reference_scores is not None
    assert groups.reference_tokens is not None
    own = objective.group_sums(groups)
    vft = reference_nll(groups.reference_scores, groups.reference_tokens) / totals.reference_tokens
    if objective.replaces_reference_loss:
        per_group = own / totals.supervised_tokens
        alignment = torch.zeros_like(own)
    else:
        alignment = own / totals.groups
        per_group = vft + weight * alignment
    loss = per_group.sum()
    finite = per_group.detach().isfinite()
    right, wrong = groups.right(), batch.mask & ~groups.right()
    measured = [
        loss,
        vft.sum(),
        alignment.sum(),
        torch.where(right, groups.scores, 0.0).sum(),
        right.sum(),
        torch.where(wrong, groups.scores, 0.0).sum(),
        wrong.sum(),
        batch.attention_mask.sum() if batch.groups else loss.new_zeros(()),
        (~finite).sum(),
    ]
    if not all(finite.tolist()):
        raise RuntimeError("the loss of the reference step is not finite")
    return loss, torch.stack([value.detach().double() for value in measured])


def padded_train_step(
    engine: Any,
    batches: Sequence[PaddedBatch],
    objective: Objective,
    weight: float,
    totals: PaddedTotals,
    learning_rate: float,
) -> PaddedStats:
    """Forward and backward passes over the micro-batches of one rank, then one optimiser step."""
    sums = torch.zeros(9, dtype=torch.float64)
    for index, batch in enumerate(batches):
        engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
        loss, measured = micro_loss(engine, batch, objective, weight, totals)
        engine.backward(loss)
        sums += measured
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
    engine.step()
    return PaddedStats(loss=sums[0].item(), grad_norm=float(norm))
