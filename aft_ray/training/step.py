"""One optimiser step on a DeepSpeed engine, split into passes and over ranks. It does not use Ray.

What `train_step` does, in this order:

    1. groups that are split over several passes: the scores of their responses without gradients, those of all ranks
       added up, and from the loss the derivative with respect to each score
    2. for each pass: forward pass, loss, backward pass; for a piece of a split group the loss is the scores times their
       derivatives, whose gradient is that of the true loss
    3. the gradients of all ranks are added up, and the weights change

Invariants: the losses of all passes and ranks add up to the loss of the whole step, because each is divided by the
totals of the whole step; every rank makes the same passes; the host does not wait for the device before the end of
step 2; a loss that is not finite stops every rank before the weights change.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from aft_ray.objectives import Objective, ScoredGroups, reference_nll
from aft_ray.training.batch import Batch
from aft_ray.training.batching import StepPlan, StepTotals
from aft_ray.training.forward.packing import empty_row
from aft_ray.training.forward.scoring import response_logprobs


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
        tokens: tokens of the packed rows of all ranks: each prompt once, or once in each piece of a split group.
        passes: forward and backward passes of each rank.
        score_passes: forward passes of each rank that computed scores of split groups.
        checkpoint_due: whether a rank asked for a training state after the step.
    """

    loss: float
    vft_loss: float
    alignment_loss: float
    grad_norm: float
    right_score: float
    wrong_score: float
    tokens: int
    passes: int
    score_passes: int
    seconds: float
    learning_rate: float
    checkpoint_due: bool


@dataclass(frozen=True)
class Measured:
    """What was measured of some groups. The tensors are on the device, so that nothing waits for it.

    Attributes:
        sums: [8] float64, in the order in which `train_step` unpacks them.
        finite: [groups] bool, whether the loss of each group is finite.
    """

    question_ids: tuple[str, ...]
    sums: Tensor
    finite: Tensor

    def at_fault(self) -> list[str]:
        """The questions whose loss is not finite. Waits for the device."""
        return [name for name, ok in zip(self.question_ids, self.finite.tolist(), strict=True) if not ok]


@dataclass(frozen=True)
class _ScoredPiece:
    """What is known of a piece of a split group before its backward pass.

    Attributes:
        derivatives: [responses of the row] float32, of the step's loss with respect to each log-probability.
        random_state: that before the forward pass, which the second forward pass must repeat (dropout).
        measured: that of the whole group.
    """

    derivatives: Tensor
    random_state: tuple[Tensor, Tensor | None]
    measured: Measured


def scored_groups(logprobs: Tensor, batch: Batch) -> ScoredGroups:
    """The groups of a batch with their scores, differentiable.

    A score is the mean token log-probability of the response, nats per token. A candidate that is masked out has
    score 0.

    Args:
        logprobs: [responses] float32, the log-probability of each response of the groups, nats.
    """
    scores = logprobs / batch.tokens
    return ScoredGroups(
        scores=torch.where(batch.mask, scores[batch.slots], 0.0),
        rewards=batch.rewards,
        mask=batch.mask,
        correct=batch.correct,
        sampler_scores=batch.sampler_scores,
        tokens=torch.where(batch.mask, batch.tokens[batch.slots], 0.0),
        reference_scores=scores[batch.references],
        reference_tokens=batch.tokens[batch.references],
    )


def batch_loss(
    logprobs: Tensor, batch: Batch, objective: Objective, weight: float, totals: StepTotals
) -> tuple[Tensor, Measured]:
    """The share of a batch's groups in the loss of their step, a differentiable scalar; and measurements.

    The shares of all groups of the step add up to L_VFT + weight * L_A.

    Args:
        logprobs: [responses] float32, the log-probability of each response of the groups, nats.
        totals: what the losses of the whole step are divided by.
    """
    groups = scored_groups(logprobs, batch)
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
        (~finite).sum(),
    ]
    sums = torch.stack([value.detach().double() for value in measured])
    return loss, Measured(batch.question_ids, sums, finite)


def train_step(
    engine: Any,
    batches: Sequence[Batch],
    plan: StepPlan,
    objective: Objective,
    weight: float,
    learning_rate: float,
    checkpoint_due: bool = False,
) -> StepStats:
    """All passes of this rank over its batches, then one optimiser step. All ranks call it together.

    Args:
        batches: those that the plan has for this rank, in its order; `training.batch` makes them.
        weight: w of L_VFT + w * L_A.
        checkpoint_due: this rank asks for a training state after the step. All ranks learn of it with the losses.

    Raises:
        NonFiniteLoss: on every rank. For a loss the weights have not changed.
    """
    started = time.monotonic()
    measured = compute_gradients(engine, batches, plan, objective, weight)
    of_rank = [sum(batch.row.columns for batch in batches), int(checkpoint_due)]
    counts = torch.tensor(of_rank, dtype=torch.float64, device=engine.device)
    sums = torch.cat([torch.stack([one.sums for one in measured] or [counts.new_zeros(8)]).sum(dim=0), counts])
    dist.all_reduce(sums)
    sums /= _ranks_per_batch(plan)
    loss_sum, vft, alignment, right, rights, wrong, wrongs, faults, computed, asked = sums.tolist()
    if faults:
        raise NonFiniteLoss(_gather_ids([name for one in measured for name in one.at_fault()]))
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    grad_norm = _optimizer_step(engine)
    if not math.isfinite(grad_norm) or not engine.was_step_applied():
        raise NonFiniteLoss(_gather_ids([name for batch in batches for name in batch.question_ids]), "gradient")
    return StepStats(
        loss=loss_sum,
        vft_loss=vft,
        alignment_loss=alignment,
        grad_norm=grad_norm,
        right_score=right / rights if rights else math.nan,
        wrong_score=wrong / wrongs if wrongs else math.nan,
        tokens=int(computed),
        passes=plan.train_passes,
        score_passes=plan.score_passes,
        seconds=time.monotonic() - started,
        learning_rate=learning_rate,
        checkpoint_due=asked > 0,
    )


def compute_gradients(
    engine: Any, batches: Sequence[Batch], plan: StepPlan, objective: Objective, weight: float
) -> list[Measured]:
    """Steps 1 and 2 of `train_step`. All ranks call it together.

    Returns:
        What was measured of the groups that count on this rank.
    """
    device, ranks = engine.device, dist.get_world_size()
    empty = empty_row(0).to(device)
    batches = [batch.to(device) for batch in batches]
    pieces = [batch for batch in batches if batch.piece is not None]
    scored = _score_pieces(engine, pieces, plan, objective, weight) if plan.score_passes else []
    measured = [one.measured for one, batch in zip(scored, pieces, strict=True) if batch.piece and batch.piece.counted]
    for number in range(plan.train_passes):
        engine.set_gradient_accumulation_boundary(number == plan.train_passes - 1)
        batch = batches[number] if number < len(batches) else None
        if batch is None:
            loss = response_logprobs(engine, empty).sum()
        elif number < len(scored):
            with _replayed(scored[number].random_state, device):
                logprobs = response_logprobs(engine, batch.row)
            loss = (logprobs * scored[number].derivatives).sum()
        else:
            loss, of_batch = batch_loss(response_logprobs(engine, batch.row), batch, objective, weight, plan.totals)
            measured.append(of_batch)
        # DeepSpeed averages gradients over the ranks, but the shares of the loss must be added up.
        engine.backward(loss * ranks)
    return measured


def _score_pieces(
    engine: Any, pieces: Sequence[Batch], plan: StepPlan, objective: Objective, weight: float
) -> list[_ScoredPiece]:
    """Step 1 of `train_step`. All ranks call it together, with the pieces that each has."""
    device = engine.device
    empty = empty_row(0).to(device)
    logprobs = torch.zeros(plan.split_responses, device=device)
    random_states = []
    with torch.no_grad():
        for number in range(plan.score_passes):
            if number >= len(pieces):
                response_logprobs(engine, empty)
                continue
            random_states.append(_random_state(device))
            _of_group(logprobs, pieces[number])[pieces[number].row_responses] = response_logprobs(
                engine, pieces[number].row
            )
    dist.all_reduce(logprobs)  # each response is in one piece, and zero elsewhere
    logprobs /= _ranks_per_batch(plan)
    scored = []
    for batch, random_state in zip(pieces, random_states, strict=True):
        own = _of_group(logprobs, batch).detach().requires_grad_()
        loss, measured = batch_loss(own, batch, objective, weight, plan.totals)
        (derivatives,) = torch.autograd.grad(loss, own)
        scored.append(_ScoredPiece(derivatives[batch.row_responses], random_state, measured))
    return scored


def _ranks_per_batch(plan: StepPlan) -> int:
    """Ranks that have the same batches, since they compute each row together (`training.forward.sequence_parallel`)."""
    return dist.get_world_size() // len(plan.shares)


def _of_group(logprobs: Tensor, batch: Batch) -> Tensor:
    """The part of the log-probabilities of all split groups that is the group's of a piece, as a view."""
    assert batch.piece is not None
    return logprobs[batch.piece.first : batch.piece.first + len(batch.tokens)]


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The state of the CPU's random numbers, and of the device's."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextlib.contextmanager
def _replayed(state: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    """A context in which the random numbers of a state come again. Afterwards they go on as if it had not been."""
    of_cpu, of_device = state
    with torch.random.fork_rng([device] if of_device is not None else []):
        torch.set_rng_state(of_cpu)
        if of_device is not None:
            torch.cuda.set_rng_state(of_device, device)
        yield


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
    """The ids of all ranks, sorted, each once."""
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, question_ids)
    return sorted({name for names in gathered for name in names})
