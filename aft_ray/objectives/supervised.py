"""The losses without ranking: cross-entropy on reference responses, and on right samples as well.

Both are token means: the numerator adds token losses, the denominator counts the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from aft_ray.objectives.base import Objective, ScoredGroups


def reference_nll(reference_scores: Tensor, reference_tokens: Tensor) -> Tensor:
    """Negative log-likelihood of each reference response, [groups] float32: the numerator of L_VFT."""
    return -reference_scores.float() * reference_tokens.float()


def l_vft(reference_scores: Tensor, reference_tokens: Tensor) -> Tensor:
    """L_VFT: token-mean cross-entropy on the reference responses, a float32 scalar (arXiv 2309.02144)."""
    return reference_nll(reference_scores, reference_tokens).sum() / reference_tokens.sum().clamp(min=1)


@dataclass(frozen=True)
class Vft(Objective):
    """Vanilla fine-tuning: L_A = 0, so the total is L_VFT. Pushes the reference up and looks at no candidate."""

    name: ClassVar[str] = "vft"
    uses_candidates: ClassVar[bool] = False

    def group_sums(self, groups: ScoredGroups) -> Tensor:
        return torch.where(torch.zeros_like(groups.mask), groups.scores.float(), 0.0).sum(dim=1)


@dataclass(frozen=True)
class Rft(Objective):
    """Rejection-sampling fine-tuning (arXiv 2308.01825): cross-entropy on the reference and on the right samples.

    Pushes the reference and every right candidate (reward above 0) up, token by token alike; wrong ones are left
    out. Needs `tokens`, `reference_scores` and `reference_tokens`; raises ValueError without them. The caller masks
    repeated samples and those that repeat the reference.
    """

    name: ClassVar[str] = "rft"
    replaces_reference_loss: ClassVar[bool] = True

    def group_sums(self, groups: ScoredGroups) -> Tensor:
        if groups.tokens is None or groups.reference_scores is None or groups.reference_tokens is None:
            raise ValueError("rft needs tokens, reference_scores and reference_tokens")
        right = groups.right()
        nll = torch.where(right, -groups.scores.float(), 0.0) * torch.where(right, groups.tokens, 0).float()
        return reference_nll(groups.reference_scores, groups.reference_tokens) + nll.sum(dim=1)

    def denominator(self, groups: ScoredGroups) -> int:
        """Tokens of the reference responses and of the right candidates."""
        assert groups.tokens is not None
        assert groups.reference_tokens is not None
        return int(torch.where(groups.right(), groups.tokens, 0).sum() + groups.reference_tokens.sum())
