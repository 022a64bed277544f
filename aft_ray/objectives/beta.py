"""β of `aft_boundary` without a search: rules that read it off the group itself.

How far below the worst right candidate may a wrong one fall? Each rule answers from scores, with a stopped gradient,
and never below zero. docs/beta.md compares them with a grid of constants; `auto` is the one that did best.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from aft_ray.objectives.base import ScoredGroups, mean_over

# Groups → β of each candidate as the worse member of its pairs, [groups, k] or [groups, 1], nats per token.
BetaRule = Callable[[ScoredGroups], Tensor]


def lowest_of_better(scores: Tensor, pairs: Tensor) -> Tensor:
    """s_j* = min{s_k : k ≻ j}, [groups, k]; zero for a candidate that nothing beats."""
    lowest = torch.where(pairs, scores[:, :, None], torch.inf).amin(dim=1)
    return torch.where(pairs.any(dim=1), lowest, 0.0)


def spread(groups: ScoredGroups) -> Tensor:
    """β_j = mean{s_i : i ≻ j} − s_j*: a wrong candidate may fall as far below the worst right one as that one lies
    below the mean of the right ones. Zero with a single right candidate."""
    s, pairs = groups.clean_scores().detach(), groups.ordered_pairs()
    better = pairs.sum(dim=1)
    mean = torch.where(pairs, s[:, :, None], 0.0).sum(dim=1) / better.clamp(min=1)
    return torch.where(better > 0, mean - lowest_of_better(s, pairs), 0.0).clamp(min=0)


def gap(groups: ScoredGroups) -> Tensor:
    """β = mean over pairs of s_i − s_j under the sampler: wrong candidates may fall as far below the worst right one as
    they lay, on average, below the right ones when they were sampled."""
    sampled, pairs = groups.clean_sampler_scores(), groups.ordered_pairs()
    return mean_over(sampled[:, :, None] - sampled[:, None, :], pairs).clamp(min=0)[:, None]


def hold(groups: ScoredGroups) -> Tensor:
    """β_j = s_j* − s_j under the sampler: each wrong candidate keeps the distance to the worst right one that it was
    sampled with; one that lay above it is brought down to it."""
    sampled, pairs = groups.clean_sampler_scores(), groups.ordered_pairs()
    distance = lowest_of_better(sampled, pairs) - sampled
    return torch.where(pairs.any(dim=1), distance, 0.0).clamp(min=0)


def balance(groups: ScoredGroups) -> Tensor:
    """2β = log Σ exp(2 s_j* − s_i − s_j) − log Σ exp(s_j − s_i) over the pairs: the β with which the loss pulls the
    worse candidates of a group up as hard, in sum, as it pushes them down. They are drawn together, not away."""
    s, pairs = groups.clean_scores().detach(), groups.ordered_pairs()
    up = 2 * lowest_of_better(s, pairs)[:, None, :] - s[:, :, None] - s[:, None, :]
    down = s[:, None, :] - s[:, :, None]
    twice = [torch.where(pairs, e, -torch.inf).flatten(1).logsumexp(dim=1) for e in (up, down)]
    has_pair = pairs.flatten(1).any(dim=1)
    return torch.where(has_pair, (twice[0] - twice[1]) / 2, 0.0).clamp(min=0)[:, None]


def extent(groups: ScoredGroups) -> Tensor:
    """β = highest − lowest score of the group under the sampler: a wrong candidate may fall as far below the worst
    right one as the sampler's own candidates lie apart."""
    sampled, mask = groups.clean_sampler_scores(), groups.mask
    if sampled.shape[1] == 0:  # no candidate column to compare
        return sampled
    highest = torch.where(mask, sampled, -torch.inf).amax(dim=1)
    lowest = torch.where(mask, sampled, torch.inf).amin(dim=1)
    return torch.where(mask.any(dim=1), highest - lowest, 0.0)[:, None]


BETA_RULES: dict[str, BetaRule] = {"spread": spread, "gap": gap, "hold": hold, "balance": balance, "extent": extent}
BETA_RULES["auto"] = extent
