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
    rewards: [groups, k] quality; only the order within a group counts, and for `rft` whether it is above zero.
    mask: [groups, k] bool; False for padding, undecided and repeated candidates.
    tokens: [groups, k] response lengths. reference_scores, reference_tokens: [groups] of the reference response.
    """

    scores: Tensor
    rewards: Tensor
    mask: Tensor
    tokens: Tensor | None = None
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
        """[groups, k] bool: unmasked candidates with a reward above zero."""
        return self.mask & (self.rewards > 0)


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

    def __call__(
        self,
        scores: Tensor,
        rewards: Tensor,
        mask: Tensor,
        *,
        tokens: Tensor | None = None,
        reference_scores: Tensor | None = None,
        reference_tokens: Tensor | None = None,
    ) -> Tensor:
        """The mean loss, a float32 scalar. Arguments as in `ScoredGroups`."""
        groups = ScoredGroups(scores, rewards, mask, tokens, reference_scores, reference_tokens)
        return self.group_sums(groups).sum() / max(self.denominator(groups), 1)


def log1p_sum_exp(exponents: Tensor, valid: Tensor) -> Tensor:
    """log(1 + Σ exp(x)) over the valid entries of each group, [groups]; stable, exactly zero where none is valid.

    exponents, valid: [groups, ...]. The 1 is a further exponent of zero, so the maximum of the exponents is finite
    and no infinity meets a zero in the backward pass.
    """
    masked = torch.where(valid, exponents, -torch.inf).flatten(1)
    return torch.logsumexp(torch.cat([masked.new_zeros(len(masked), 1), masked], dim=1), dim=1)
