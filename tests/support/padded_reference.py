"""The training step with padded rows that this project had before packed ones: what the packed step is compared with.

Each response has a row with its prompt. Prompts are padded on the left and responses on the right, logits exist for all
response columns at once, and a group cannot be split. Frozen: nothing of `aft_ray.training` is used but the choice of
the candidates.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from aft_ray.objectives import ScoredGroups, reference_nll
from aft_ray.storage.records import Verdict
from aft_ray.training.batching import trained_candidates

REFERENCE = -1  # in `PaddedBatch.slot_of_row`


@dataclass(frozen=True)
class PaddedBatch:
    """A batch with a row for the reference response of each group and one for each trained candidate.

    Attributes:
        input_ids, attention_mask, position_ids: [rows, prompt columns + response columns] int64.
        response_mask: [rows, response columns] bool.
        group_of_row, slot_of_row: [rows], the group, and the candidate in it or REFERENCE.
        rewards, sampler_scores, correct, mask: [groups, k].
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    response_mask: Tensor
    group_of_row: Tensor
    slot_of_row: Tensor
    rewards: Tensor
    sampler_scores: Tensor
    correct: Tensor
    mask: Tensor


def collate(groups, objective, pad_token_id) -> PaddedBatch:
    rows = []  # prompt, response, group, slot
    k = max([1, *(len(group.candidates) for group in groups)])
    rewards, sampler_scores = torch.zeros(len(groups), k), torch.zeros(len(groups), k)
    correct, mask = torch.zeros(len(groups), k, dtype=torch.bool), torch.zeros(len(groups), k, dtype=torch.bool)
    for index, group in enumerate(groups):
        rows.append((group.prompt_token_ids, group.reference_token_ids, index, REFERENCE))
        for slot in trained_candidates(group, objective):
            candidate = group.candidates[slot]
            rows.append((group.prompt_token_ids, candidate.token_ids, index, slot))
            rewards[index, slot], sampler_scores[index, slot] = candidate.reward, candidate.score
            correct[index, slot], mask[index, slot] = candidate.verdict is Verdict.RIGHT, True
    prompt_columns = max(len(prompt) for prompt, *_ in rows)
    response_columns = max(len(response) for _, response, *_ in rows)
    input_ids = torch.full((len(rows), prompt_columns + response_columns), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, (prompt, response, _, _) in enumerate(rows):
        columns = slice(prompt_columns - len(prompt), prompt_columns + len(response))
        input_ids[row, columns] = torch.tensor(prompt + response)
        attention_mask[row, columns] = 1
    return PaddedBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(dim=1) - 1).clamp(min=0),
        response_mask=attention_mask[:, prompt_columns:].bool(),
        group_of_row=torch.tensor([group for *_, group, _ in rows]),
        slot_of_row=torch.tensor([slot for *_, slot in rows]),
        rewards=rewards,
        correct=correct,
        sampler_scores=sampler_scores,
        mask=mask,
    )


def response_logprobs(model, batch) -> tuple[Tensor, Tensor]:
    """The log-probability of each row's response, in nats, and its number of tokens, [rows] each.

    Args:
        model: a causal language model as transformers loads it.
    """
    columns = batch.response_mask.shape[1]
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        logits_to_keep=columns + 1,
        use_cache=False,
    ).logits[:, -columns - 1 : -1]
    mask = batch.response_mask
    logprobs = -F.cross_entropy(logits[mask].float(), batch.input_ids[:, -columns:][mask], reduction="none")
    sums = torch.zeros_like(mask, dtype=torch.float32).masked_scatter(mask, logprobs).sum(dim=1)
    return sums, mask.sum(dim=1).float()


def score_groups(model, batch) -> ScoredGroups:
    sums, tokens = response_logprobs(model, batch)
    scores = sums / tokens
    reference, candidate = batch.slot_of_row == REFERENCE, batch.slot_of_row >= 0
    position = (batch.group_of_row[candidate], batch.slot_of_row[candidate])
    empty = scores.new_zeros(batch.mask.shape)
    return ScoredGroups(
        scores=empty.index_put(position, scores[candidate]),
        rewards=batch.rewards,
        mask=batch.mask,
        correct=batch.correct,
        sampler_scores=batch.sampler_scores,
        tokens=empty.index_put(position, tokens[candidate]),
        reference_scores=scores[reference],
        reference_tokens=tokens[reference],
    )


def step_loss(model, groups, objective, weight, pad_token_id) -> Tensor:
    """L_VFT + weight * L_A of some groups as one batch, or the objective's own loss if it covers the references."""
    scored = score_groups(model, collate(groups, objective, pad_token_id))
    own = objective.group_sums(scored).sum() / objective.denominator(scored)
    if objective.replaces_reference_loss:
        return own
    vft = reference_nll(scored.reference_scores, scored.reference_tokens).sum() / scored.reference_tokens.sum()
    return vft + weight * own
