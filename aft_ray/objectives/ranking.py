"""Ranking losses that AFT is compared with: RRHF and PRO, each with and without AFT's detached constraint.

Each class is the L_A of L = L_VFT + w * L_A, for binary and graded rewards. Equation numbers are those of arXiv
2309.02144. s_i is the score of candidate i (nats per token), r_i its reward, i ≻ j means r_i > r_j, and D(x) is x with
its gradient stopped. Every loss takes [groups, k] tensors, returns one value per group, and is zero for a group without
a pair. A `_detached` loss differs in one place: it does not lower the worse candidate of a pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from aft_ray.objectives.base import Objective, ScoredGroups, rowwise_log1p_sum_exp


@dataclass(frozen=True)
class Rrhf(Objective):
    """RRHF: Σ_{i≻j} max(0, s_j − s_i) (Eq. 18; arXiv 2304.05302).

    In every pair in which the worse candidate scores higher, it raises the better one and lowers the worse one, with
    the same gradient however far apart they are. A pair in the right order contributes zero.
    """

    name: ClassVar[str] = "rrhf"

    def group_sums(self, groups: ScoredGroups) -> Tensor:
        return self._hinge(groups, groups.masked_scores())

    def _hinge(self, groups: ScoredGroups, worse: Tensor) -> Tensor:
        """worse: [groups, k], the scores that a candidate has as the worse one of a pair."""
        margins = worse[:, None, :] - groups.masked_scores()[:, :, None]
        return torch.where(groups.ordered_pairs(), margins, 0.0).clamp(min=0).sum(dim=(1, 2))


@dataclass(frozen=True)
class RrhfDetached(Rrhf):
    """RRHF with the detached constraint: Σ_{i≻j} max(0, D(s_j) − s_i) (arXiv 2309.02144).

    In every pair in the wrong order it raises the better candidate and does not lower the worse one.
    """

    name: ClassVar[str] = "rrhf_detached"

    def group_sums(self, groups: ScoredGroups) -> Tensor:
        return self._hinge(groups, groups.masked_scores().detach())


@dataclass(frozen=True)
class Pro(Objective):
    """PRO: Σ_i log[1 + Σ_{j≺i} exp(τ_ij s_j − τ_i s_i)], with τ_ij = r_i − r_j and τ_i = max_j τ_ij (Eq. 20; arXiv
    2306.17492).

    It raises each candidate against all worse ones at once and lowers those, the more the further apart their rewards
    are. Unlike the other ranking losses it reads the differences of rewards and not only their order.
    """

    name: ClassVar[str] = "pro"

    def group_sums(self, groups: ScoredGroups) -> Tensor:
        return self._contrast(groups, groups.masked_scores())

    def _contrast(self, groups: ScoredGroups, worse: Tensor) -> Tensor:
        """worse: [groups, k], the scores that a candidate has as the worse one of a pair."""
        s, pairs = groups.masked_scores(), groups.ordered_pairs()
        if s.shape[1] == 0:  # there is no candidate column to take a maximum over
            return s.sum(dim=1)
        r = torch.where(groups.mask, groups.rewards.float(), 0.0)
        tau = torch.where(pairs, r[:, :, None] - r[:, None, :], 0.0)  # [groups, i, j]
        own = tau.amax(dim=2) * s
        return rowwise_log1p_sum_exp(tau * worse[:, None, :] - own[:, :, None], pairs)


@dataclass(frozen=True)
class ProDetached(Pro):
    """PRO with the detached constraint: Σ_i log[1 + Σ_{j≺i} exp(τ_ij D(s_j) − τ_i s_i)] (arXiv 2309.02144).

    It raises each candidate against all worse ones and does not lower those. A candidate of a middle class is raised by
    its pairs with the classes below it.
    """

    name: ClassVar[str] = "pro_detached"

    def group_sums(self, groups: ScoredGroups) -> Tensor:
        return self._contrast(groups, groups.masked_scores().detach())
