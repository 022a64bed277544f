"""The Alignment Fine-Tuning losses of arXiv 2309.02144: rank better candidates above worse ones, with a constraint.

Each class is the L_A of the total loss L = L_VFT + w * L_A. Equation numbers are those of the paper. One implementation
serves binary and graded rewards: i ≻ j means r_i > r_j, and with binary rewards i is right and j is wrong. s_i is the
score of candidate i, nats per token. D(x) is x with its gradient stopped. Every loss takes scores, rewards and mask of
shape [groups, k], returns one value per group, and is zero for a group without a pair (all rewards equal).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from aft_ray.objectives.base import Objective, ScoredGroups, log1p_sum_exp
from aft_ray.objectives.beta import BETA_RULES, lowest_of_better


@dataclass(frozen=True)
class Align(Objective):
    """Ranking without a constraint: log[1 + Σ_{i≻j} exp(s_j − s_i)] (Eq. 6 for binary, Eq. 14 for graded rewards).

    It raises the score of the better candidate of every pair and lowers that of the worse one without limit. Of the
    objectives here it assesses best and generates worst.
    """

    name: ClassVar[str] = "align"

    def group_sums(self, groups: ScoredGroups) -> Tensor:
        s = groups.masked_scores()
        return log1p_sum_exp(s[:, None, :] - s[:, :, None], groups.ordered_pairs())


@dataclass(frozen=True)
class AftDetached(Objective):
    """Detached constraint: log[1 + Σ_{i≻j} exp(D(s_j) − s_i)] (DC, Eq. 7; RDC1, Eq. 12).

    It raises the better candidate of every pair, the more the higher the worse one scores, and does not lower the
    worse one. With graded rewards a candidate of a middle class is raised by its pairs with the classes below it.
    """

    name: ClassVar[str] = "aft_detached"

    def group_sums(self, groups: ScoredGroups) -> Tensor:
        s = groups.masked_scores()
        return log1p_sum_exp(s.detach()[:, None, :] - s[:, :, None], groups.ordered_pairs())


@dataclass(frozen=True)
class AftDetachedLowest(Objective):
    """Detached constraint on the lowest class: as `aft_detached`, with D on members of the lowest class only (RDC2,
    Eq. 13).

    It raises the better candidate of every pair and lowers the worse one, unless nothing in its group is worse still:
    the members of the lowest class, whose likelihood would collapse, are not lowered. With binary rewards it equals
    `aft_detached`.
    """

    name: ClassVar[str] = "aft_detached_lowest"

    def group_sums(self, groups: ScoredGroups) -> Tensor:
        s, pairs = groups.masked_scores(), groups.ordered_pairs()
        lowest = ~pairs.any(dim=2)  # [groups, k]: better than no other candidate
        worse = torch.where(lowest, s.detach(), s)
        return log1p_sum_exp(worse[:, None, :] - s[:, :, None], pairs)


@dataclass(frozen=True)
class AftBoundary(Objective):
    """Boundary constraint: log{1 + Σ_{i≻j} [exp(s_j − s_i) + exp(D(T_ij) − s_j)]}, with T_ij = 2 s_j* − 2β − s_i and
    s_j* = min{s_k : k ≻ j} (BC, Eq. 8; RBC, Eq. 11).

    With binary rewards s_j* is the score of the worst right candidate. The loss raises the better candidate of a pair
    and moves the worse one towards the boundary B = s_j* − β: down if it scores above, up if it scores below. For a
    single pair the coefficient of that pull is 2 exp(B − s_i) sinh(B − s_j) / Z, with Z the argument of the log. T is
    detached, because otherwise the loss would lower the worst right candidate. For β → ∞ the loss is `align`.

    Attributes:
        beta: β, nats per token, at least 0. With 0.15 a wrong candidate may have a perplexity of exp(0.15) = 1.16 times
            that of the worst right one. A name of `BETA_RULES` takes β from each group instead; "auto" is the rule
            that did best (docs/beta.md).
    """

    beta: float | str = 0.15
    name: ClassVar[str] = "aft_boundary"

    def __post_init__(self) -> None:
        if isinstance(self.beta, str):
            if self.beta not in BETA_RULES:
                raise ValueError(f"aft_boundary has no rule {self.beta!r} for beta; it has {', '.join(BETA_RULES)}")
        elif not self.beta >= 0:
            raise ValueError(f"aft_boundary needs beta >= 0 nats per token, not {self.beta}")

    def group_sums(self, groups: ScoredGroups) -> Tensor:
        s = groups.masked_scores()
        if s.shape[1] == 0:  # there is no candidate column to take a minimum over
            return s.sum(dim=1)
        pairs = groups.ordered_pairs()
        rank = s[:, None, :] - s[:, :, None]  # [groups, i, j]: s_j − s_i
        if self.beta == math.inf:
            return log1p_sum_exp(rank, pairs)
        fixed = s.detach()
        lowest_better = lowest_of_better(fixed, pairs)
        beta = BETA_RULES[self.beta](groups) if isinstance(self.beta, str) else self.beta
        target = 2 * (lowest_better - beta)[:, None, :] - fixed[:, :, None]  # D(T_ij)
        return log1p_sum_exp(torch.stack([rank, target - s[:, None, :]], dim=1), pairs[:, None].expand(-1, 2, -1, -1))
