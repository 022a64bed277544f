"""One optimiser step on a DeepSpeed engine, split into micro-batches and over ranks. It does not use Ray.

The order of calls is: `train_step` for each optimiser step; in it `micro_loss` for each micro-batch of the rank, which
calls `score_groups` and `response_logprobs`; then the gradients of all ranks are added up and the weights change.

Invariants: the losses of all micro-batches and ranks add up to the loss of the whole step, because each is divided by
the totals of the whole step; a loss that is not finite stops every rank before the weights change.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from aft_ray.objectives import Objective, ScoredGroups, reference_nll
from aft_ray.training.batching import StepTotals
from aft_ray.training.collate import REFERENCE, Batch


class NonFiniteLoss(RuntimeError):
    """A loss or a gradient was not finite. The engine must not be used again.

    Attributes:
        question_ids: the questions with such a loss; for a gradient, all questions of the step.
    """

    def __init__(self, question_ids: list[str], what: str = "loss") -> None:
        shown = ", ".join(question_ids[:5]) + (f" and {len(question_ids) - 5} more" if len(question_ids) > 5 else "")
        super().__init__(f"the {what} is not finite on the questions {shown}; a lower learning rate may help")
        self.question_ids = question_ids


@dataclass(frozen=True)
class StepStats:
    """What was measured in a step. It is the same on every rank, except for `seconds`.

    Attributes:
        loss: L_VFT + w * L_A, or the loss of an objective that covers the references itself (`rft`).
        vft_loss: L_VFT, the cross-entropy on the reference responses, nats per token.
        alignment_loss: L_A without its weight; 0 for `vft` and `rft`.
        grad_norm: norm of the gradient before clipping.
        right_score, wrong_score: mean score of the trained candidates with a right answer and of the others, nats per
            token; NaN if there are none.
        tokens: tokens of prompts and responses, without padding.
    """

    loss: float
    vft_loss: float
    alignment_loss: float
    grad_norm: float
    right_score: float
    wrong_score: float
    tokens: int
    seconds: float
    learning_rate: float


@dataclass(frozen=True)
class MicroStats:
    """What was measured in one micro-batch.

    Attributes:
        sums: [9] float64, detached, in the order in which `train_step` unpacks them.
        at_fault: ids of the questions whose loss is not finite.
    """

    sums: Tensor
    at_fault: list[str]


def response_logprobs(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The log-probability of each row's response, in nats, and its number of tokens.

    Only the logits of the response columns and of the column before them are computed, since the logits of a column
    predict the token of the next.

    Returns:
        Two tensors of shape [rows], float32. The first is differentiable.
    """
    columns = batch.response_columns
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


def score_groups(model: Any, batch: Batch) -> ScoredGroups:
    """The groups of a batch with their scores under the model, differentiable.

    A score is the mean token log-probability of the response, nats per token. A candidate without a row has score 0 and
    is masked out.
    """
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
    model: Any, batch: Batch, objective: Objective, weight: float, totals: StepTotals, scale: float = 1.0
) -> tuple[Tensor, MicroStats]:
    """The share of one micro-batch in the loss of its step: a differentiable scalar, times `scale`; and measurements.

    With `scale` 1 the shares of all micro-batches and ranks add up to L_VFT + weight * L_A of the step.

    Args:
        totals: what the losses of the whole step are divided by.
    """
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
        batch.attention_mask.sum() if batch.question_ids else loss.new_zeros(()),
        (~finite).sum(),
    ]
    sums = torch.stack([value.detach().double() for value in measured])
    at_fault = [name for name, ok in zip(batch.question_ids, finite.tolist(), strict=True) if not ok]
    return loss * scale, MicroStats(sums, at_fault)


def train_step(
    engine: Any,
    micro_batches: Sequence[Batch],
    objective: Objective,
    weight: float,
    totals: StepTotals,
    learning_rate: float,
) -> StepStats:
    """Forward and backward passes over this rank's micro-batches, then one optimiser step. All ranks call it together.

    Args:
        micro_batches: at least one, and equally many on every rank.
        weight: w of L_VFT + w * L_A.
        totals: those of the whole step.

    Raises:
        NonFiniteLoss: on every rank. For a loss the weights have not changed.
    """
    started = time.monotonic()
    sums = torch.zeros(9, dtype=torch.float64, device=engine.device)
    at_fault: list[str] = []
    for index, batch in enumerate(micro_batches):
        engine.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
        # DeepSpeed averages gradients over the ranks, but the shares of the loss must be added up.
        loss, stats = micro_loss(
            engine, batch.to(engine.device), objective, weight, totals, scale=dist.get_world_size()
        )
        engine.backward(loss)
        sums += stats.sums
        at_fault += stats.at_fault
    dist.all_reduce(sums)
    loss_sum, vft, alignment, right, rights, wrong, wrongs, tokens, faults = sums.tolist()
    if faults:
        raise NonFiniteLoss(_gather_ids(at_fault))
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    grad_norm = _optimizer_step(engine)
    if not torch.tensor(grad_norm).isfinite() or not engine.was_step_applied():
        raise NonFiniteLoss(_gather_ids([name for batch in micro_batches for name in batch.question_ids]), "gradient")
    return StepStats(
        loss=loss_sum,
        vft_loss=vft,
        alignment_loss=alignment,
        grad_norm=grad_norm,
        right_score=right / rights if rights else float("nan"),
        wrong_score=wrong / wrongs if wrongs else float("nan"),
        tokens=int(tokens),
        seconds=time.monotonic() - started,
        learning_rate=learning_rate,
    )


def _optimizer_step(engine: Any) -> float:
    """Takes the optimiser step. Returns the norm of its gradient before clipping."""
    if engine.zero_optimization_stage() > 0:
        engine.step()
        return float(engine.get_global_grad_norm())
    # Without ZeRO every rank holds the whole averaged gradient, and DeepSpeed reports no norm.
    norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
    engine.step()
    return float(norm)


def _gather_ids(question_ids: list[str]) -> list[str]:
    """The ids of all ranks, sorted."""
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, question_ids)
    return sorted(name for names in gathered for name in names)
