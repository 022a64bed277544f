"""The Alignment Fine-Tuning losses of arXiv 2309.02144: rank better candidates above worse ones, with a constraint.

Each is L_A of L = L_VFT + w * L_A. One implementation serves binary and graded rewards: i ≻ j means r_i > r_j.
D(x) is a stopped gradient. Z below is the argument of the log.
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
    """log[1 + Σ_{i≻j} exp(s_j − s_i)] (Eq. 6 and 14): ranking without a constraint.

    Pushes the better member of every pair up and the worse one down, without end: it assesses best and generates
    worst.
    """

    name: ClassVar[str] = "align"

    def group_sums(self, groups: ScoredGroups) -> Tensor:
        s = groups.clean_scores()
        return log1p_sum_exp(s[:, None, :] - s[:, :, None], groups.ordered_pairs())


@dataclass(frozen=True)
class AftDetached(Objective):
    """log[1 + Σ_{i≻j} exp(D(s_j) − s_i)] (DC, Eq. 7; RDC1, Eq. 12).

    Pushes the better member of every pair up, harder the better the worse member scores; the worse one is held
    where it is by this pair. A middle quality class is still pushed up by the classes below it.
    """

    name: ClassVar[str] = "aft_detached"

    def group_sums(self, groups: ScoredGroups) -> Tensor:
        s = groups.clean_scores()
        return log1p_sum_exp(s.detach()[:, None, :] - s[:, :, None], groups.ordered_pairs())


@dataclass(frozen=True)
class AftDetachedLowest(Objective):
    """As `aft_detached`, but D only on members of the lowest quality class of the group (RDC2, Eq. 13).

    Pushes the better member of every pair up; a worse member is pushed down, unless nothing in its group is worse
    still: the lowest class, whose likelihood would be crushed, is held. With binary rewards it is `aft_detached`.
    """

    name: ClassVar[str] = "aft_detached_lowest"

    def group_sums(self, groups: ScoredGroups) -> Tensor:
        s, pairs = groups.clean_scores(), groups.ordered_pairs()
        lowest = ~pairs.any(dim=2)  # beats nobody
        worse = torch.where(lowest, s.detach(), s)
        return log1p_sum_exp(worse[:, None, :] - s[:, :, None], pairs)


@dataclass(frozen=True)
class AftBoundary(Objective):
    """log{1 + Σ_{i≻j} [exp(s_j − s_i) + exp(D(T_ij) − s_j)]}, T_ij = 2 s_j* − 2β − s_i (BC, Eq. 8; RBC, Eq. 11).

    s_j* = min{s_k : k ≻ j}, with binary rewards the score of the worst right candidate. Pushes the better member up
    and the worse one towards the boundary B = s_j* − β: down above it, up below it, with the coefficient
    2 exp(B − s_i) sinh(B − s_j) / Z for a single pair. T is detached, or the loss would push the worst right
    candidate down. β → ∞ gives `align`.

    beta: nats per token, at least 0; 0.15 lets a wrong candidate have a perplexity e^0.15 times the worst right one's.
        A name of `BETA_RULES` reads β off each group instead; "auto" is the rule of them that did best.
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
        s = groups.clean_scores()
        if s.shape[1] == 0:  # no candidate column to take a minimum over
            return s.sum(dim=1)
        pairs = groups.ordered_pairs()
        rank = s[:, None, :] - s[:, :, None]
        if self.beta == math.inf:
            return log1p_sum_exp(rank, pairs)
        fixed = s.detach()
        lowest_better = lowest_of_better(fixed, pairs)
        beta = BETA_RULES[self.beta](groups) if isinstance(self.beta, str) else self.beta
        target = 2 * (lowest_better - beta)[:, None, :] - fixed[:, :, None]
        return log1p_sum_exp(torch.stack([rank, target - s[:, None, :]], dim=1), pairs[:, None].expand(-1, 2, -1, -1))
