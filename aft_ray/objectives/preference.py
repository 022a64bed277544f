"""Losses that compare with a reference policy: DPO, IRPO, DPOP and GRPO.

The reference policy is the one that sampled the candidates. The sampler returned its log-probabilities with them, so
training holds no second model. Each class is the L_A of L = L_VFT + w * L_A. s_i is the score of candidate i and
s_ref_i its score under the sampler (nats per token); Δ_i is the log-probability of the whole response minus the
sampler's (nats); i ≻ j means r_i > r_j. Every loss takes [groups, k] tensors, returns one value per group, is zero for
a group without two different rewards, and raises ValueError without the sampler's scores (or lengths, for Δ).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from aft_ray.objectives.base import Objective, ScoredGroups, mean_over, rowwise_log1p_sum_exp

# The largest exponent of a probability ratio. exp(60) is finite in float32, and a useful ratio is far below it.
_MAX_LOG_RATIO = 60.0


class _ReferencePolicyObjective(Objective):
    """An objective of this module: a dataclass none of whose options may be negative."""

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            if not (value := getattr(self, field.name)) >= 0:
                raise ValueError(f"{self.name} needs {field.name} >= 0, not {value}")


@dataclass(frozen=True)
class Dpo(_ReferencePolicyObjective):
    """DPO as a ranking loss: Σ_i log[1 + Σ_{j≺i} exp(β(s_j − s_ref_j) − β(s_i − s_ref_i))] (Eq. 16 of arXiv
    2309.02144; arXiv 2305.18290).

    It raises each candidate and lowers the worse ones, relative to their scores under the sampler. Only differences
    count, so both scores may fall together.
    """

    beta: float = 0.1
    name: ClassVar[str] = "dpo"

    def group_sums(self, groups: ScoredGroups) -> Tensor:
        gain = self.beta * (groups.masked_scores() - groups.masked_sampler_scores())
        return rowwise_log1p_sum_exp(gain[:, None, :] - gain[:, :, None], groups.ordered_pairs())


@dataclass(frozen=True)
class Irpo(_ReferencePolicyObjective):
    """Iterative reasoning preference optimisation: mean over pairs w ≻ l of −log σ(β(Δ_w − Δ_l)) − α s_w (arXiv
    2404.19733).

    It raises the better candidate of each pair against the worse one and, through α, by its own likelihood normalised
    by length, which keeps it from falling together with the worse one. It lowers the worse one.
    """

    beta: float = 0.1
    alpha: float = 1.0
    name: ClassVar[str] = "irpo"

    def group_sums(self, groups: ScoredGroups) -> Tensor:
        delta = groups.log_ratios()
        preference = -F.logsigmoid(self.beta * (delta[:, :, None] - delta[:, None, :]))
        return mean_over(preference - self.alpha * groups.masked_scores()[:, :, None], groups.ordered_pairs())


@dataclass(frozen=True)
class Dpop(_ReferencePolicyObjective):
    """DPO-Positive: mean over pairs w ≻ l of −log σ(β[Δ_w − Δ_l − λ max(0, −Δ_w)]) (arXiv 2402.13228).

    It raises the better candidate of each pair and lowers the worse one. A better candidate that is less likely than it
    was under the sampler is raised λ + 1 times as strongly.

    Attributes:
        penalty: λ.
    """

    beta: float = 0.1
    penalty: float = 5.0
    name: ClassVar[str] = "dpop"

    def group_sums(self, groups: ScoredGroups) -> Tensor:
        delta = groups.log_ratios()
        better = delta - self.penalty * (-delta).clamp(min=0)
        return mean_over(-F.logsigmoid(self.beta * (better[:, :, None] - delta[:, None, :])), groups.ordered_pairs())


@dataclass(frozen=True)
class Grpo(_ReferencePolicyObjective):
    """GRPO: mean over candidates of −min(ρ_i A_i, clip(ρ_i, 1 ± ε) A_i) + kl · (e^{−δ_i} + δ_i − 1), with δ_i = s_i −
    s_ref_i, ρ_i = e^{δ_i} and A_i = (r_i − mean r) / std r over the group (arXiv 2402.03300).

    It raises candidates whose reward is above the mean of the group and lowers the others, until their ratio ρ leaves
    1 ± ε. The term with `kl` is the k3 estimator of the KL divergence. std divides by the number of candidates.

    The ratio is that of whole responses, normalised by length, as in GSPO (arXiv 2507.18071), because a candidate is
    stored with one log-probability and not with one for each token.

    Attributes:
        clip: ε.
        kl: weight of the KL term.
    """

    clip: float = 0.2
    kl: float = 0.04
    name: ClassVar[str] = "grpo"

    def group_sums(self, groups: ScoredGroups) -> Tensor:
        mask = groups.mask & groups.ordered_pairs().flatten(1).any(dim=1)[:, None]
        rewards = torch.where(mask, groups.rewards.float(), 0.0)
        centred = rewards - mean_over(rewards, mask)[:, None]
        deviation = mean_over(centred.square(), mask).sqrt()[:, None]
        advantage = centred / torch.where(deviation > 0, deviation, 1.0)
        log_ratio = groups.masked_scores() - groups.masked_sampler_scores()
        ratio = log_ratio.clamp(max=_MAX_LOG_RATIO).exp()
        gained = torch.minimum(ratio * advantage, ratio.clamp(1 - self.clip, 1 + self.clip) * advantage)
        k3 = (-log_ratio).clamp(max=_MAX_LOG_RATIO).exp() + log_ratio - 1
        return mean_over(self.kl * k3 - gained, mask)
