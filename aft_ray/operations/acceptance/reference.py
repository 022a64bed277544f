"""Optimiser steps of plain torch in float32 on the CPU, and how far the steps of another engine are from them.

The reference starts from the same weights, which are bfloat16 numbers, and takes the same batches through the same loss
(`training.step.batch_loss`). Everything else is different: no DeepSpeed, no bfloat16 arithmetic, no GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from aft_ray.config.run import RunConfig, TrainingConfig
from aft_ray.objectives import Objective
from aft_ray.operations.acceptance.outcome import Figure
from aft_ray.training.batch import Batch
from aft_ray.training.batching import StepPlan
from aft_ray.training.forward.scoring import install_scoring, response_logprobs
from aft_ray.training.model.loading import load_model
from aft_ray.training.model.lora import add_adapters, load_adapter
from aft_ray.training.step import batch_loss

# The decay of AdamW's first moment, and its epsilon: the defaults of torch and of DeepSpeed.
BETA1, EPSILON = 0.9, 1e-8
# Limits for bfloat16 against float32, 2 to 20 times what was measured (docs/acceptance.md). What they must catch (a
# missing mask, a lost batch, a loss that is divided twice, a tensor without its gradient) moves a figure by more.
LOSS_LIMIT, SECOND_LOSS_LIMIT = 0.01, 0.02
NORM_LIMIT = 0.02
DIRECTION_LIMIT = 0.01
TENSOR_LIMIT = 0.03
# Of the step itself, in learning rates: only float32 rounding is allowed.
STEP_LIMIT = 0.01
# A tensor whose gradient is smaller than this share of the largest one is not compared alone: it is mostly rounding.
_SMALL = 0.01


@dataclass(frozen=True)
class Work:
    """A model with the batches of one optimiser step.

    Attributes:
        directory: the model, in bfloat16.
        batches: those of the plan's only rank, none of which is a piece of a split group.
    """

    directory: Path
    config: RunConfig
    objective: Objective
    batches: Sequence[Batch]
    plan: StepPlan


@dataclass(frozen=True)
class Steps:
    """Two optimiser steps on the same groups.

    Attributes:
        losses: the loss of each.
        grad_norm: the norm of the first gradient before clipping.
        gradients: by parameter, the first gradient after clipping, float32, on the CPU.
    """

    losses: tuple[float, float]
    grad_norm: float
    gradients: Mapping[str, Tensor]


def torch_steps(work: Work, dtype: str = "float32", device: str = "cpu", adapter: Path | None = None) -> Steps:
    """Two steps of torch's AdamW, without DeepSpeed.

    Args:
        adapter: the directory of the adapters that are trained; None: the weights are trained.
    """
    training, lora = work.config.training, work.config.lora
    model = load_model(work.directory, dtype)
    if lora is not None and adapter is not None:
        add_adapters(model, lora, str(work.directory))
        load_adapter(model, adapter)
    model = model.to(device)
    install_scoring(model)
    parameters = {name: one for name, one in model.named_parameters() if one.requires_grad}
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=training.learning_rate, weight_decay=training.weight_decay, eps=EPSILON
    )
    losses: list[float] = []
    norms: list[float] = []
    gradients: dict[str, Tensor] = {}
    for _ in range(2):
        optimizer.zero_grad()
        losses.append(0.0)
        for batch in work.batches:
            there = batch.to(torch.device(device))
            loss, _ = batch_loss(response_logprobs(model, there.row), there, work.objective, 1.0, work.plan.totals)
            torch.autograd.backward(loss)
            losses[-1] += loss.item()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters.values(), training.max_grad_norm)))
        if not gradients:
            gradients = {
                name: one.grad.to("cpu", torch.float32, copy=True)
                for name, one in parameters.items()
                if one.grad is not None
            }
        optimizer.step()
    return Steps((losses[0], losses[1]), norms[0], gradients)


def compare(seen: Steps, expected: Steps) -> list[Figure]:
    """The distances of `seen` from `expected`, with their limits.

    The distance between the directions of two gradients is 1 minus their cosine. It is given for all tensors together
    and for the tensor where it is largest, because a single wrong tensor hardly moves the whole.
    """
    whole = _distance(_flat(seen.gradients, expected.gradients), _flat(expected.gradients, expected.gradients))
    largest = max(float(one.norm()) for one in expected.gradients.values())
    worst, name = 0.0, "none"
    for key, gradient in expected.gradients.items():
        if float(gradient.norm()) < _SMALL * largest:
            continue
        distance = _distance(seen.gradients[key].flatten(), gradient.flatten()) if key in seen.gradients else 2.0
        if not distance <= worst:
            worst, name = distance, key
    return [
        *compare_losses(seen, expected),
        Figure("gradient norm off by", seen.grad_norm / expected.grad_norm - 1, limit=NORM_LIMIT),
        Figure("gradient direction off by", whole, limit=DIRECTION_LIMIT),
        Figure(f"worst tensor ({name}) off by", worst, limit=TENSOR_LIMIT),
    ]


def compare_losses(seen: Steps, expected: Steps) -> list[Figure]:
    """The losses before and after the first step, relative to the expected ones."""
    return [
        Figure("loss", expected.losses[0], "nats in float32"),
        Figure("off by", seen.losses[0] / expected.losses[0] - 1, limit=LOSS_LIMIT),
        Figure("after a step off by", seen.losses[1] / expected.losses[1] - 1, limit=SECOND_LOSS_LIMIT),
    ]


def adamw_step(weight: Tensor, gradient: Tensor, training: TrainingConfig) -> Tensor:
    """AdamW's first step (Loshchilov and Hutter, arXiv 1711.05101) from a weight and its gradient, both float32.

    In the first step both moments, corrected for their bias, are the gradient and its square.
    """
    rate = training.learning_rate
    return weight * (1 - rate * training.weight_decay) - rate * gradient / (gradient.abs() + EPSILON)


def _distance(one: Tensor, other: Tensor) -> float:
    cosine = torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=0)
    return 1 - float(cosine)


def _flat(gradients: Mapping[str, Tensor], names: Mapping[str, Tensor]) -> Tensor:
    """All gradients in one row, in the order of `names`; zeros for one that is missing."""
    return torch.cat([gradients[name].flatten() if name in gradients else names[name].flatten() * 0 for name in names])
