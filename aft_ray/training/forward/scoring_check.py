"""Compares the scores of a model with those of its own forward pass, before anything is trained.

Invariant: a model is trained on the scores that its own forward pass gives for each response alone, or not at all.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from aft_ray.training.forward.packed_attention import cannot_share_prompts
from aft_ray.training.forward.packing import PackedRow, pack
from aft_ray.training.forward.scoring import Scoring

# Tokens of the prompts, and of the responses to each.
_PROMPTS, _RESPONSES = (6, 3), ((5, 1, 7), (4,))
# Most that log-probabilities may be off on average, as a share of the largest logit. In float32 nothing but rounding is
# let pass. In bfloat16 every logit is rounded by up to 0.4 % of itself, and a token near the border between two experts
# may take the other one; the mean is far below this then, and far above it when a response sees another one or the
# logits have a wrong scale.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}


class ScoringError(RuntimeError):
    """A model's scores are not those of its own forward pass. The message is one sentence."""


def check_scoring(model: Any, device: torch.device) -> None:
    """Lets a model compute packed rows only if they give the scores of plain ones. All ranks call it together.

    If packed rows do not, the model computes each response in a row of its own; if those do not either, it computes
    its logits as its own forward pass does. A line says so. Weights, gradients, and random states stay as they are.

    Raises:
        ScoringError: a response's score changes with padding behind it.
    """
    name, scoring = type(model).__name__, model.scoring
    reason = cannot_share_prompts(model)
    row, sequences = _sample(model.config.get_text_config().vocab_size, device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        expected, largest = _own_logprobs(model, row, sequences)
        limit = _TOLERANCE[model.dtype] * max(1.0, largest)

        def differs(how: Scoring) -> bool:
            model.scoring = how
            off = (model(row=row) - expected).abs() / limit
            # Where the model's own scores are no numbers, the loss will say so.
            return _largest_of_ranks(off.where(expected.isfinite(), 0.0).mean()) > 1

        if scoring.shares_prompts and differs(scoring):
            reason = "packed rows give other scores than plain ones"
            scoring = replace(scoring, shares_prompts=False)
        if not scoring.shares_prompts:
            _say(f"{name} computes a prompt again for each of its responses, because {reason}")
            if differs(scoring):
                scoring = replace(scoring, own_head=True)
                _say(f"{name} computes all logits of a pass at once, because what it does to them is not known")
                if differs(scoring):
                    raise ScoringError(
                        f"{name} scores a response differently with padding behind it, so it cannot be trained here; "
                        f"take a model whose layers are causal"
                    )
    model.scoring = scoring
    model.train(was_training)


def _sample(vocabulary: int, device: torch.device) -> tuple[PackedRow, list[Tensor]]:
    """A row of random tokens; and each response behind its prompt, [1, tokens]."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=generator).tolist()

    prompts = [tokens(count) for count in _PROMPTS]
    responses = [[tokens(count) for count in counts] for counts in _RESPONSES]
    sequences = [
        torch.tensor([prompt + response], device=device)
        for prompt, of_prompt in zip(prompts, responses, strict=True)
        for response in of_prompt
    ]
    return pack(prompts, responses).to(device), sequences


def _own_logprobs(model: Any, row: PackedRow, sequences: list[Tensor]) -> tuple[Tensor, float]:
    """The log-probabilities of the row's targets by the model's own forward pass; and the largest logit."""
    logprobs, largest = [], 0.0
    for sequence, length in zip(sequences, row.lengths.tolist(), strict=True):
        logits = model(input_ids=sequence, use_cache=False).logits[0, -length - 1 : -1].float()
        largest = max(largest, float(logits.abs().max()))
        logprobs.append(logits.log_softmax(-1).gather(1, sequence[0, -length:, None])[:, 0])
    return torch.cat(logprobs), largest


def _largest_of_ranks(off: Tensor) -> float:
    """The largest of all ranks, so that they decide alike; infinite if one is not a number."""
    largest = off.nan_to_num(nan=torch.inf)
    if dist.is_initialized():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return float(largest)


def _say(line: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(line, file=sys.stderr, flush=True)
