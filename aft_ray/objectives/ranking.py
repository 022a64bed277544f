"""Ranking losses that AFT is compared with: RRHF and PRO, each also with AFT's detached constraint.

Like the AFT losses, each is L_A of L = L_VFT + w * L_A, for binary and graded rewards. D(x) is a stopped gradient. The
`_detached` twins differ in one place: the worse member of a pair is not pushed down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from aft_ray.objectives.base import Objective, ScoredGroups, each_log1p_sum_exp


@dataclass(frozen=True)
class Rrhf(Objective):
    """Σ_{i≻j} max(0, s_j − s_i) (Eq. 18; arXiv 2304.05302).

    Of each pair in the wrong order, pushes the better up and the worse down, equally hard however wrong the order is;
    pairs in the right order are left alone.
    """

    name: ClassVar[str] = "rrhf"

    def group_sums(self, groups: ScoredGroups) -> Tensor:
        return self._hinge(groups, groups.clean_scores())

    def _hinge(self, groups: ScoredGroups, worse: Tensor) -> Tensor:
        margins = worse[:, None, :] - groups.clean_scores()[:, :, None]
        return torch.where(groups.ordered_pairs(), margins, 0.0).clamp(min=0).sum(dim=(1, 2))


@dataclass(frozen=True)
class RrhfDetached(Rrhf):
    """Σ_{i≻j} max(0, D(s_j) − s_i): `rrhf` that pushes the better of each misordered pair up and holds the worse."""

    name: ClassVar[str] = "rrhf_detached"

    def group_sums(self, groups: ScoredGroups) -> Tensor:
        return self._hinge(groups, groups.clean_scores().detach())


@dataclass(frozen=True)
class Pro(Objective):
    """Σ_i log[1 + Σ_{j≺i} exp(τ_ij s_j − τ_i s_i)], τ_ij = r_i − r_j, τ_i = max_j τ_ij (Eq. 20; arXiv 2306.17492).

    Pushes each candidate up against all worse ones at once and those down, the more the further apart their rewards
    are. Unlike the others it reads the size of rewards, not only their order.
    """

    name: ClassVar[str] = "pro"

    def group_sums(self, groups: ScoredGroups) -> Tensor:
        return self._contrast(groups, groups.clean_scores())

    def _contrast(self, groups: ScoredGroups, worse: Tensor) -> Tensor:
        s, pairs = groups.clean_scores(), groups.ordered_pairs()
        if s.shape[1] == 0:  # no candidate column to take a maximum over
            return s.sum(dim=1)
        r = torch.where(groups.mask, groups.rewards.float(), 0.0)
        tau = torch.where(pairs, r[:, :, None] - r[:, None, :], 0.0)
        own = tau.amax(dim=2) * s
        return each_log1p_sum_exp(tau * worse[:, None, :] - own[:, :, None], pairs)


@dataclass(frozen=True)
class ProDetached(Pro):
    """Σ_i log[1 + Σ_{j≺i} exp(τ_ij D(s_j) − τ_i s_i)]: `pro` that holds the worse candidates where they are.

    A candidate of middle quality is still pushed up by those below it.
    """

    name: ClassVar[str] = "pro_detached"

    def group_sums(self, groups: ScoredGroups) -> Tensor:
        return self._contrast(groups, groups.clean_scores().detach())
