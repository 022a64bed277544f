"""Losses against a reference policy: DPO, IRPO, DPOP and GRPO.

The reference is the policy that sampled the candidates; the sampler returned its log-probabilities with them, so no
second model is held. s_ref is a score under it (nats per token), Δ a sequence log-probability minus the sampler's
(nats). Like the others each is L_A of L = L_VFT + w * L_A, and zero for a group without two different rewards.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from aft_ray.objectives.base import Objective, ScoredGroups, each_log1p_sum_exp, mean_over

# Largest exponent of a probability ratio: exp(60) is finite in float32, and no sane ratio comes near.
_LARGEST = 60.0


class _AgainstSampler(Objective):
    """What these losses share: none of their options may be negative."""

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            if not (value := getattr(self, field.name)) >= 0:
                raise ValueError(f"{self.name} needs {field.name} >= 0, not {value}")


@dataclass(frozen=True)
class Dpo(_AgainstSampler):
    """Σ_i log[1 + Σ_{j≺i} exp(β(s_j − s_ref_j) − β(s_i − s_ref_i))] (Eq. 16, the ranking form; arXiv 2305.18290).

    Pushes each candidate up, and those worse than it down, measured from where the sampler had them. Only differences
    count, so both may fall together.
    """

    beta: float = 0.1
    name: ClassVar[str] = "dpo"

    def group_sums(self, groups: ScoredGroups) -> Tensor:
        gain = self.beta * (groups.clean_scores() - groups.clean_sampler_scores())
        return each_log1p_sum_exp(gain[:, None, :] - gain[:, :, None], groups.ordered_pairs())


@dataclass(frozen=True)
class Irpo(_AgainstSampler):
    """mean over pairs w ≻ l of −log σ(β(Δ_w − Δ_l)) − α s_w (arXiv 2404.19733).

    Pushes the better of each pair up, twice: against the worse, and by its own length-normalised likelihood, which
    keeps it from falling along with the worse one. Pushes the worse down.
    """

    beta: float = 0.1
    alpha: float = 1.0
    name: ClassVar[str] = "irpo"

    def group_sums(self, groups: ScoredGroups) -> Tensor:
        gain = groups.gains()
        preference = -F.logsigmoid(self.beta * (gain[:, :, None] - gain[:, None, :]))
        return mean_over(preference - self.alpha * groups.clean_scores()[:, :, None], groups.ordered_pairs())


@dataclass(frozen=True)
class Dpop(_AgainstSampler):
    """mean over pairs w ≻ l of −log σ(β[Δ_w − Δ_l − λ max(0, −Δ_w)]) (DPO-Positive, arXiv 2402.13228).

    Pushes the better of each pair up and the worse down; a better one that has become less likely than it was to the
    sampler is pushed up λ + 1 times as hard.

    penalty: λ.
    """

    beta: float = 0.1
    penalty: float = 5.0
    name: ClassVar[str] = "dpop"

    def group_sums(self, groups: ScoredGroups) -> Tensor:
        gain = groups.gains()
        better = gain - self.penalty * (-gain).clamp(min=0)
        return mean_over(-F.logsigmoid(self.beta * (better[:, :, None] - gain[:, None, :])), groups.ordered_pairs())


@dataclass(frozen=True)
class Grpo(_AgainstSampler):
    """mean over candidates of −min(ρ_i A_i, clip(ρ_i, 1 ± ε) A_i) + kl · (e^{−δ_i} + δ_i − 1) (arXiv 2402.03300).

    δ_i = s_i − s_ref_i, ρ_i = e^{δ_i}, A_i = (r_i − mean r) / std r over the group. The KL term is the k3 estimator.
    Pushes candidates of more than the mean reward up and the others down, until their ratio leaves 1 ± ε.

    The ratio is that of whole responses, normalised by length, as in GSPO (arXiv 2507.18071): a candidate stores one
    log-probability, not one a token. std divides by the number of candidates.
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
        change = groups.clean_scores() - groups.clean_sampler_scores()
        ratio = change.clamp(max=_LARGEST).exp()
        gained = torch.minimum(ratio * advantage, ratio.clamp(1 - self.clip, 1 + self.clip) * advantage)
        k3 = (-change).clamp(max=_LARGEST).exp() + change - 1
        return mean_over(self.kl * k3 - gained, mask)
