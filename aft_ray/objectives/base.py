"""What a loss on groups is, and the arithmetic on pairs that the ranking losses share.

Invariants: everything is computed in float32 whatever comes in; an entry whose mask is False may hold anything, NaN
included, and touches neither the value nor the gradient; a group without a pair gives exactly zero.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScoredGroups:
    """Groups as an objective sees them.

    scores: [groups, k] mean token log-probability of each candidate, nats per token, any float type.
    rewards: [groups, k] quality; the ranking losses read its order alone, `pro` its differences, `grpo` its moments.
    mask: [groups, k] bool; False for padding, undecided and repeated candidates.
    correct: [groups, k] bool, the answer is right; none: where the reward is above zero, as with binary feedback.
    tokens: [groups, k] response lengths.
    sampler_scores: [groups, k] scores under the weights that sampled the candidates: the reference policy.
    reference_scores, reference_tokens: [groups] of the reference response.
    """

    scores: Tensor
    rewards: Tensor
    mask: Tensor
    correct: Tensor | None = None
    tokens: Tensor | None = None
    sampler_scores: Tensor | None = None
    reference_scores: Tensor | None = None
    reference_tokens: Tensor | None = None

    def clean_scores(self) -> Tensor:
        """Scores in float32 with zero where masked: `where` keeps garbage out of the backward pass as well."""
        return torch.where(self.mask, self.scores.float(), 0.0)

    def ordered_pairs(self) -> Tensor:
        """[groups, k, k] bool: entry (i, j) says i ≻ j, r_i > r_j with both unmasked. Equal rewards form no pair."""
        rewards = torch.where(self.mask, self.rewards, 0.0)
        return (rewards[:, :, None] > rewards[:, None, :]) & self.mask[:, :, None] & self.mask[:, None, :]

    def right(self) -> Tensor:
        """[groups, k] bool: unmasked candidates whose answer is right."""
        return self.mask & (self.rewards > 0 if self.correct is None else self.correct)

    def clean_sampler_scores(self) -> Tensor:
        """Scores under the sampler in float32, zero where masked. Raises ValueError when they were not given."""
        if self.sampler_scores is None:
            raise ValueError("this objective compares with the sampler: it needs sampler_scores")
        return torch.where(self.mask, self.sampler_scores.float(), 0.0)

    def gains(self) -> Tensor:
        """Δ, [groups, k]: sequence log-probability minus the sampler's, nats. Needs `tokens` and `sampler_scores`."""
        if self.tokens is None:
            raise ValueError("this objective compares whole sequences: it needs tokens")
        return (self.clean_scores() - self.clean_sampler_scores()) * torch.where(self.mask, self.tokens, 0).float()


class Objective(ABC):
    """A loss on groups of scored candidates: the sum of `group_sums` over the groups, divided by `denominator`.

    A trainer that splits a step into micro-batches adds up the sums and divides by the whole step's denominator, so
    that the split changes nothing.

    uses_candidates: whether the loss reads sampled candidates at all.
    replaces_reference_loss: True when the loss covers the reference response too, so the total is this loss alone
        and its denominator counts tokens. False: the total is L_VFT + weight * this loss, counted in groups.
    """

    name: ClassVar[str]
    uses_candidates: ClassVar[bool] = True
    replaces_reference_loss: ClassVar[bool] = False

    @abstractmethod
    def group_sums(self, groups: ScoredGroups) -> Tensor:
        """Each group's share of the numerator, [groups] float32."""

    def denominator(self, groups: ScoredGroups) -> int:
        """What the summed loss is divided by: the number of groups, unless the objective says otherwise."""
        return len(groups.scores)

    def __call__(self, scores: Tensor, rewards: Tensor, mask: Tensor, **more: Tensor) -> Tensor:
        """The mean loss, a float32 scalar. Arguments and their names as in `ScoredGroups`."""
        groups = ScoredGroups(scores, rewards, mask, **more)
        return self.group_sums(groups).sum() / max(self.denominator(groups), 1)


def log1p_sum_exp(exponents: Tensor, valid: Tensor) -> Tensor:
    """log(1 + Σ exp(x)) over the valid entries of each group, [groups]; stable, exactly zero where none is valid.

    exponents, valid: [groups, ...]. The 1 is a further exponent of zero, so the largest exponent is finite and no
    infinity meets a zero in the backward pass.
    """
    return _log1p_sum_exp(exponents.flatten(1), valid.flatten(1))


def each_log1p_sum_exp(exponents: Tensor, valid: Tensor) -> Tensor:
    """Σ_i log(1 + Σ_j exp(x_ij)) over the valid entries of each group, [groups]. exponents, valid: [groups, k, k]."""
    return _log1p_sum_exp(exponents, valid).sum(dim=1)


def _log1p_sum_exp(exponents: Tensor, valid: Tensor) -> Tensor:
    """Over the last dimension."""
    if exponents.shape[-1] == 0:
        return exponents.sum(dim=-1)
    masked = torch.where(valid, exponents, -torch.inf)
    largest = masked.detach().amax(dim=-1, keepdim=True).clamp(min=0)
    total = (masked - largest).exp().sum(dim=-1) + (-largest[..., 0]).exp()
    return total.log() + largest[..., 0]


def mean_over(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of the valid entries of each group, [groups]; zero where none is valid. values, valid: [groups, ...]."""
    total = torch.where(valid, values, 0.0).flatten(1).sum(dim=1)
    return total / valid.flatten(1).sum(dim=1).clamp(min=1)
