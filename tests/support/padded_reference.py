"""The loss of a step as the project computed it before packed rows: what the packed step is compared with."""

from torch import Tensor

from aft_ray.objectives import reference_nll
from benchmarks.padded_step import collate, score_groups


def step_loss(model, groups, objective, weight, pad_token_id) -> Tensor:
    """L_VFT + weight * L_A of some groups as one batch, or the objective's own loss if it covers the references."""
    scored = score_groups(model, collate(groups, objective, pad_token_id))
    own = objective.group_sums(scored).sum() / objective.denominator(scored)
    if objective.replaces_reference_loss:
        return own
    vft = reference_nll(scored.reference_scores, scored.reference_tokens).sum() / scored.reference_tokens.sum()
    return vft + weight * own
