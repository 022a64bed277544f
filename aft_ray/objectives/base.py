"""What an objective is, what it is given, and the arithmetic on pairs of candidates that the losses share.

Invariants: everything is computed in float32, whatever the inputs are; an entry whose mask is False may hold any value,
NaN included, and changes neither the loss nor the gradient; a group without a pair has a loss of exactly zero.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScoredGroups:
    """A batch of groups with the scores of their candidates.

    A score is the mean token log-probability of a whole response, end-of-sequence token included, in nats per token.

    Attributes:
        scores: [groups, k], of the candidates under the model that is trained; any float type.
        rewards: [groups, k], the quality of the candidates. The ranking losses read only their order, `pro` reads
            their differences, `grpo` their mean and deviation.
        mask: [groups, k] bool; False for padding and for candidates that are not trained on.
        correct: [groups, k] bool, whether the answer is right. If None, an answer is right when its reward is above
            zero, as with binary feedback.
        tokens: [groups, k], response lengths.
        sampler_scores: [groups, k], scores under the weights that sampled the candidates: the reference policy.
        reference_scores: [groups], scores of the reference responses.
        reference_tokens: [groups], lengths of the reference responses.
    """

    scores: Tensor
    rewards: Tensor
    mask: Tensor
    correct: Tensor | None = None
    tokens: Tensor | None = None
    sampler_scores: Tensor | None = None
    reference_scores: Tensor | None = None
    reference_tokens: Tensor | None = None

    def masked_scores(self) -> Tensor:
        """The scores, [groups, k] float32, zero where the mask is False.

        `torch.where` also keeps NaN and infinity of masked entries out of the backward pass; a product would not.
        """
        return torch.where(self.mask, self.scores.float(), 0.0)

    def ordered_pairs(self) -> Tensor:
        """[groups, k, k] bool: entry (i, j) is True if i ≻ j, that is r_i > r_j and neither is masked out."""
        rewards = torch.where(self.mask, self.rewards, 0.0)
        return (rewards[:, :, None] > rewards[:, None, :]) & self.mask[:, :, None] & self.mask[:, None, :]

    def right(self) -> Tensor:
        """[groups, k] bool: the candidates with a right answer that are not masked out."""
        return self.mask & (self.rewards > 0 if self.correct is None else self.correct)

    def masked_sampler_scores(self) -> Tensor:
        """The scores under the sampler, [groups, k] float32, zero where masked. Raises ValueError if there are none."""
        if self.sampler_scores is None:
            raise ValueError("this objective compares with the sampler: it needs sampler_scores")
        return torch.where(self.mask, self.sampler_scores.float(), 0.0)

    def log_ratios(self) -> Tensor:
        """Δ, [groups, k] float32: log-probability of the whole response minus the sampler's, in nats.

        Raises ValueError without `tokens` or `sampler_scores`.
        """
        if self.tokens is None:
            raise ValueError("this objective compares whole sequences: it needs tokens")
        return (self.masked_scores() - self.masked_sampler_scores()) * torch.where(self.mask, self.tokens, 0).float()


class Objective(ABC):
    """A loss on groups of scored candidates: the sum of `group_sums` over the groups, divided by `denominator`.

    A trainer that splits an optimiser step into micro-batches adds up the sums and divides by the denominator of the
    whole step, so the split does not change the loss. An objective of your own is a subclass with `group_sums`; its
    options are the parameters of its constructor.

    Attributes:
        name: what `objective.name` calls it.
        uses_candidates: the loss reads sampled candidates. If False, its rounds sample nothing.
        ranks_candidates: the loss compares candidates of different reward: it is zero for a group without two of them,
            and the trainer does not run the candidates of such a group through the model.
        right_candidates_only: the loss reads only candidates whose answer is right and that do not repeat the
            reference response; the trainer does not run the others through the model.
        replaces_reference_loss: the loss covers the reference response too, so it is the total loss, and its
            denominator counts tokens. If False, the total is L_VFT + weight * this loss, which counts groups.
    """

    name: ClassVar[str]
    uses_candidates: ClassVar[bool] = True
    ranks_candidates: ClassVar[bool] = True
    right_candidates_only: ClassVar[bool] = False
    replaces_reference_loss: ClassVar[bool] = False

    @abstractmethod
    def group_sums(self, groups: ScoredGroups) -> Tensor:
        """The numerator of each group, [groups] float32."""

    def denominator(self, groups: ScoredGroups) -> int:
        """What the sum over the groups is divided by: the number of groups, unless a subclass says otherwise."""
        return len(groups.scores)

    def __call__(self, scores: Tensor, rewards: Tensor, mask: Tensor, **more: Tensor) -> Tensor:
        """The mean loss, a float32 scalar. The arguments have the names and shapes of `ScoredGroups`."""
        groups = ScoredGroups(scores, rewards, mask, **more)
        return self.group_sums(groups).sum() / max(self.denominator(groups), 1)


def log1p_sum_exp(exponents: Tensor, valid: Tensor) -> Tensor:
    """log(1 + Σ exp(x)) over all valid entries of each group; exactly zero for a group without a valid entry.

    Args:
        exponents: [groups, ...] float32.
        valid: bool, of the same shape.

    Returns:
        [groups] float32. Value and gradient are finite for any finite exponents.
    """
    return _log1p_sum_exp(exponents.flatten(1), valid.flatten(1))


def rowwise_log1p_sum_exp(exponents: Tensor, valid: Tensor) -> Tensor:
    """Σ_i log(1 + Σ_j exp(x_ij)) over the valid entries of each group.

    Args:
        exponents: [groups, k, k] float32, with i the second and j the last dimension.
        valid: bool, of the same shape.

    Returns:
        [groups] float32.
    """
    return _log1p_sum_exp(exponents, valid).sum(dim=1)


def _log1p_sum_exp(exponents: Tensor, valid: Tensor) -> Tensor:
    """log(1 + Σ exp(x)) over the last dimension.

    The 1 is exp(0), so zero takes part in the maximum that is subtracted: the maximum is finite even where nothing is
    valid, and no infinity is multiplied by zero in the backward pass.
    """
    if exponents.shape[-1] == 0:
        return exponents.sum(dim=-1)
    masked = torch.where(valid, exponents, -torch.inf)
    largest = masked.detach().amax(dim=-1, keepdim=True).clamp(min=0)
    total = (masked - largest).exp().sum(dim=-1) + (-largest[..., 0]).exp()
    return total.log() + largest[..., 0]


def mean_over(values: Tensor, valid: Tensor) -> Tensor:
    """The mean of the valid entries of each group, [groups]; zero where none is valid. values, valid: [groups, ...]."""
    total = torch.where(valid, values, 0.0).flatten(1).sum(dim=1)
    return total / valid.flatten(1).sum(dim=1).clamp(min=1)
