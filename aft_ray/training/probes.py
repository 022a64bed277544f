"""The probes of a version: sequences of its round, and the scores that the trainer gives them.

Invariant: the probes are scored with the very weights that are published.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from aft_ray.objectives import build_objective
from aft_ray.storage.records import Group
from aft_ray.training.collate import collate
from aft_ray.training.step import score_groups
from aft_ray.weights.version_manifest import Probe


def choose_probes(groups: Sequence[Group], count: int, max_length: int) -> list[Group]:
    """The sequences of a round that become probes, each as a group whose reference is the probe's response.

    Args:
        count: most probes.
        max_length: the context of the engines, tokens.
    """
    sequences = [
        replace(group, reference_token_ids=group.candidates[0].token_ids, candidates=[]) if group.candidates else group
        for group in groups
    ]
    # An engine scores a sequence by generating one more token, for which its context must have room.
    fitting = [one for one in sequences if len(one.prompt_token_ids) + len(one.reference_token_ids) < max_length]
    return fitting[:count]


def score_probes(engine: Any, groups: Sequence[Group], pad_token_id: int) -> list[Probe]:
    """The probes with their scores under the new weights. ZeRO-3 gathers weights on all ranks, so all must score.

    Args:
        engine: the DeepSpeed engine with the new weights.
        groups: what `choose_probes` returned.
    """
    batch = collate(groups, build_objective("vft"), pad_token_id).to(engine.device)
    engine.eval()
    with torch.no_grad():
        scores = score_groups(engine, batch).reference_scores
    engine.train()
    assert scores is not None
    return [
        Probe(group.prompt_token_ids, group.reference_token_ids, score)
        for group, score in zip(groups, scores.tolist(), strict=True)
    ]
