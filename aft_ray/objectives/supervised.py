"""The losses without ranking: cross-entropy on the reference responses (VFT), and on right samples as well (RFT).

Both are means over tokens: the numerator adds up the losses of tokens, and the denominator counts the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from aft_ray.objectives.base import Objective, ScoredGroups


def reference_nll(reference_scores: Tensor, reference_tokens: Tensor) -> Tensor:
    """Negative log-likelihood of each whole reference response in nats, [groups] float32: the numerator of L_VFT.

    Args:
        reference_scores: [groups], nats per token.
        reference_tokens: [groups], lengths.
    """
    return -reference_scores.float() * reference_tokens.float()


def l_vft(reference_scores: Tensor, reference_tokens: Tensor) -> Tensor:
    """L_VFT, the cross-entropy on the reference responses as a mean over tokens; a float32 scalar, nats per token.

    arXiv 2309.02144 prints a sum over tokens; docs/objectives.md says why this is a mean. Arguments as in
    `reference_nll`.
    """
    return reference_nll(reference_scores, reference_tokens).sum() / reference_tokens.sum().clamp(min=1)


@dataclass(frozen=True)
class Vft(Objective):
    """Vanilla fine-tuning (VFT; supervised fine-tuning on the references): L_A = 0, so the total loss is L_VFT.

    It raises the reference response. It is zero for every group, whatever its candidates are.
    """

    name: ClassVar[str] = "vft"
    uses_candidates: ClassVar[bool] = False
    ranks_candidates: ClassVar[bool] = False

    def group_sums(self, groups: ScoredGroups) -> Tensor:
        # Zeros that depend on the scores, so that a backward pass exists.
        return torch.where(torch.zeros_like(groups.mask), groups.scores.float(), 0.0).sum(dim=1)


@dataclass(frozen=True)
class Rft(Objective):
    """Rejection-sampling fine-tuning (arXiv 2308.01825): −Σ log-probability / Σ tokens, over the reference responses
    and the right candidates.

    It raises the reference and every right candidate, with the same weight for each token, and leaves the wrong ones
    out. A group without a right candidate contributes its reference alone. The caller masks candidates that repeat each
    other or the reference. `group_sums` raises ValueError without `tokens`, `reference_scores` and
    `reference_tokens`.
    """

    name: ClassVar[str] = "rft"
    ranks_candidates: ClassVar[bool] = False
    right_candidates_only: ClassVar[bool] = True
    replaces_reference_loss: ClassVar[bool] = True

    def group_sums(self, groups: ScoredGroups) -> Tensor:
        if groups.tokens is None or groups.reference_scores is None or groups.reference_tokens is None:
            raise ValueError("rft needs tokens, reference_scores and reference_tokens")
        right = groups.right()
        nll = torch.where(right, -groups.scores.float(), 0.0) * torch.where(right, groups.tokens, 0).float()
        return reference_nll(groups.reference_scores, groups.reference_tokens) + nll.sum(dim=1)

    def denominator(self, groups: ScoredGroups) -> int:
        """The number of tokens of the reference responses and of the right candidates."""
        assert groups.tokens is not None
        assert groups.reference_tokens is not None
        return int(torch.where(groups.right(), groups.tokens, 0).sum() + groups.reference_tokens.sum())
