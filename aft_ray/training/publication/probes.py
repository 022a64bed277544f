"""The probes of a version: sequences of its round, and the scores that the trainer gives them.

Invariants: the probes are scored with the very weights that are published; none has more than MAX_PROBE_TOKENS tokens,
because an engine computes the log-probabilities of a whole sequence at once, in memory that vLLM does not plan for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from aft_ray.storage.records import Group
from aft_ray.training.forward.packing import pack
from aft_ray.training.forward.scoring import response_logprobs
from aft_ray.weights.version_manifest import Probe

# Most tokens of a probe, and of its response. With 150,000 tokens in the vocabulary the float32 logits of a probe have
# 300 MB. A response longer than this would measure more of what two number formats differ by on average, which does not
# shrink with the length, than of single rounding errors, which do.
MAX_PROBE_TOKENS, MAX_RESPONSE_TOKENS = 512, 256
# Probes that the trainer scores in one forward pass.
_AT_ONCE = 4


def choose_probes(groups: Sequence[Group], count: int, max_length: int) -> list[Group]:
    """The sequences of a round that become probes, each as a group whose reference is the probe's response.

    They are of different questions. The longest responses come first, since they tell the most. A sequence that is too
    long is cut: a probe need not make sense, it has to be the same on both sides.

    Args:
        count: most probes.
        max_length: the context of the engines, tokens.
    """
    # An engine scores a sequence by generating one more token, for which its context must have room.
    limit = min(MAX_PROBE_TOKENS, max_length - 1)
    longest = sorted(map(_longest_response, groups), key=lambda group: -len(group.reference_token_ids))
    return [_cut(group, limit) for group in longest[:count]]


def score_probes(engine: Any, groups: Sequence[Group]) -> list[Probe]:
    """The probes with their scores under the new weights. ZeRO-3 gathers weights on all ranks, so all must score.

    Args:
        engine: the DeepSpeed engine with the new weights.
        groups: what `choose_probes` returned, the same on every rank.
    """
    scores: list[float] = []
    engine.eval()
    with torch.no_grad():
        for first in range(0, len(groups), _AT_ONCE):
            some = groups[first : first + _AT_ONCE]
            row = pack([one.prompt_token_ids for one in some], [[one.reference_token_ids] for one in some])
            row = row.to(engine.device)
            scores += (response_logprobs(engine, row) / row.lengths).tolist()
    engine.train()
    return [
        Probe(group.prompt_token_ids, group.reference_token_ids, score)
        for group, score in zip(groups, scores, strict=True)
    ]


def _longest_response(group: Group) -> Group:
    """The group with its longest response as the reference, and without candidates."""
    responses = [group.reference_token_ids, *(candidate.token_ids for candidate in group.candidates)]
    return replace(group, reference_token_ids=max(responses, key=len), candidates=[])


def _cut(group: Group, limit: int) -> Group:
    """The group with the first tokens of its response and the last ones of its prompt, at most `limit` together."""
    response = group.reference_token_ids[: min(MAX_RESPONSE_TOKENS, limit - 1)]
    room = limit - len(response)
    return replace(group, prompt_token_ids=group.prompt_token_ids[-room:], reference_token_ids=response)
