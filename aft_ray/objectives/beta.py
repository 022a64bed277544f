"""Rules that take β of `aft_boundary` from each group, so that no search on validation data is needed.

β says how far below the worst right candidate a wrong one may score, in nats per token. Invariant: a rule returns
finite values of at least zero and lets no gradient through. docs/beta.md compares the rules with a grid of constants;
`auto` is the one that did best. The rules are this project's own; arXiv 2309.02144 searches for a constant.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from aft_ray.objectives.base import ScoredGroups, mean_over

# Groups → β of each candidate as the worse member of its pairs, [groups, k], or of a whole group, [groups, 1].
BetaRule = Callable[[ScoredGroups], Tensor]


def lowest_of_better(scores: Tensor, pairs: Tensor) -> Tensor:
    """s_j* = min{s_k : k ≻ j}, [groups, k]; zero for a candidate that no other is better than.

    Args:
        scores: [groups, k].
        pairs: [groups, k, k] bool, as `ScoredGroups.ordered_pairs` returns it.
    """
    lowest = torch.where(pairs, scores[:, :, None], torch.inf).amin(dim=1)
    return torch.where(pairs.any(dim=1), lowest, 0.0)


def spread(groups: ScoredGroups) -> Tensor:
    """β_j = mean{s_i : i ≻ j} − s_j*, [groups, k].

    A wrong candidate may score as far below the worst right one as that one scores below the mean of the right ones.
    With a single right candidate β is zero.
    """
    s, pairs = groups.masked_scores().detach(), groups.ordered_pairs()
    better = pairs.sum(dim=1)
    mean = torch.where(pairs, s[:, :, None], 0.0).sum(dim=1) / better.clamp(min=1)
    return torch.where(better > 0, mean - lowest_of_better(s, pairs), 0.0).clamp(min=0)


def gap(groups: ScoredGroups) -> Tensor:
    """β = mean over pairs of s_i − s_j under the sampler, [groups, 1].

    Wrong candidates may score as far below the worst right one as they scored below the right ones on average when
    they were sampled.
    """
    sampled, pairs = groups.masked_sampler_scores(), groups.ordered_pairs()
    return mean_over(sampled[:, :, None] - sampled[:, None, :], pairs).clamp(min=0)[:, None]


def hold(groups: ScoredGroups) -> Tensor:
    """β_j = s_j* − s_j under the sampler, [groups, k].

    Each wrong candidate keeps the distance to the worst right one that it had when it was sampled. One that scored
    above the worst right one is lowered to its score.
    """
    sampled, pairs = groups.masked_sampler_scores(), groups.ordered_pairs()
    distance = lowest_of_better(sampled, pairs) - sampled
    return torch.where(pairs.any(dim=1), distance, 0.0).clamp(min=0)


def balance(groups: ScoredGroups) -> Tensor:
    """2β = log Σ exp(2 s_j* − s_i − s_j) − log Σ exp(s_j − s_i) over the pairs, [groups, 1].

    With this β the gradients that raise the worse candidates of a group and those that lower them have the same sum, so
    the worse candidates are moved towards each other and not, as a whole, away.
    """
    s, pairs = groups.masked_scores().detach(), groups.ordered_pairs()
    up = 2 * lowest_of_better(s, pairs)[:, None, :] - s[:, :, None] - s[:, None, :]
    down = s[:, None, :] - s[:, :, None]
    log_sums = [torch.where(pairs, e, -torch.inf).flatten(1).logsumexp(dim=1) for e in (up, down)]
    has_pair = pairs.flatten(1).any(dim=1)
    return torch.where(has_pair, (log_sums[0] - log_sums[1]) / 2, 0.0).clamp(min=0)[:, None]


def extent(groups: ScoredGroups) -> Tensor:
    """β = highest − lowest score of the group under the sampler, [groups, 1].

    A wrong candidate may score as far below the worst right one as the scores of the group's candidates were apart when
    they were sampled.
    """
    sampled, mask = groups.masked_sampler_scores(), groups.mask
    if sampled.shape[1] == 0:  # there is no candidate column to compare
        return sampled
    highest = torch.where(mask, sampled, -torch.inf).amax(dim=1)
    lowest = torch.where(mask, sampled, torch.inf).amin(dim=1)
    return torch.where(mask.any(dim=1), highest - lowest, 0.0)[:, None]


BETA_RULES: dict[str, BetaRule] = {"spread": spread, "gap": gap, "hold": hold, "balance": balance, "extent": extent}
BETA_RULES["auto"] = extent
