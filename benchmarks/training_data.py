"""Groups and models of random tokens for `training.py`: only their sizes matter.

The lengths of GSM8K are sampled from quantiles of its 7,473 training questions and their answers without calculator
marks, in characters, times the tokens per character that give the means of SmolLM2's tokenizer (65 and 93; see
`aft_ray.planning.plan.workload`). Question and answer have a rank correlation of one half. The length of a candidate
relative to the reference is that of the four models whose solutions of the 1,319 test questions were published with the
data set: its logarithm has a standard deviation of 0.36 between questions and of 0.31 within one.

Invariant: the same arguments give the same groups, on every machine.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

from aft_ray.storage.records import Candidate, Group, Question, Verdict

PAD, EOS = 0, 1

# Tokens at these quantiles.
_AT = (0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
_QUESTION = (12, 25, 32, 37, 44, 49, 54, 60, 66, 73, 83, 100, 115, 146, 273)
_ANSWER = (16, 24, 34, 41, 51, 61, 72, 82, 95, 109, 128, 159, 188, 256, 431)
_TEMPLATE = 6  # tokens of "Question: ...\nAnswer:"
_BETWEEN, _WITHIN = 0.36, 0.31
_LONGEST_CANDIDATE = 320  # sampling.max_tokens of the configs for GSM8K


def gsm8k_groups(count: int, k: int, vocabulary: int, seed: int) -> list[Group]:
    """Groups with the lengths of GSM8K's questions and answers and k distinct candidates each, half of them right."""
    source = random.Random(f"gsm8k {count} {k} {seed}")
    groups = []
    for number in range(count):
        rank = source.random()
        prompt = round(_quantile(_QUESTION, rank)) + _TEMPLATE
        reference = round(_quantile(_ANSWER, rank if source.random() < 0.5 else source.random()))
        scale = reference * math.exp(source.gauss(0, _BETWEEN))
        candidates = [
            max(4, min(_LONGEST_CANDIDATE, round(scale * math.exp(source.gauss(0, _WITHIN))))) for _ in range(k)
        ]
        groups.append(_group(f"q{number}", prompt, [reference, *candidates], vocabulary, source))
    return groups


def uniform_groups(
    count: int, k: int, vocabulary: int, seed: int, *, prompt: tuple[int, int], response: tuple[int, int]
) -> list[Group]:
    """Groups whose prompts and responses have lengths between the given ones, all equally likely."""
    source = random.Random(f"uniform {count} {k} {seed}")
    return [
        _group(
            f"q{number}", source.randint(*prompt), [source.randint(*response) for _ in range(1 + k)], vocabulary, source
        )
        for number in range(count)
    ]


def needed_tokens(groups: Sequence[Group]) -> int:
    """Tokens that have to be computed: each prompt once, and every response."""
    return sum(
        len(group.prompt_token_ids)
        + len(group.reference_token_ids)
        + sum(len(candidate.token_ids) for candidate in group.candidates)
        for group in groups
    )


def write_model(directory: Path, *, vocabulary: int, hidden: int, layers: int, longest: int) -> Path:
    """Writes a random Llama in float32 with heads of 64 dimensions and untied embeddings; returns the directory.

    Args:
        longest: the longest sequence in tokens.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=-(-hidden * 8 // 24) * 8,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=longest,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def _quantile(values: Sequence[int], rank: float) -> float:
    """The value at a rank between 0 and 1, linear between the quantiles that are known."""
    above = next(index for index, at in enumerate(_AT) if rank <= at and index)
    low, high = _AT[above - 1], _AT[above]
    return values[above - 1] + (values[above] - values[above - 1]) * (rank - low) / (high - low)


def _group(name: str, prompt: int, responses: Sequence[int], vocabulary: int, source: random.Random) -> Group:
    def tokens(count: int) -> list[int]:
        return [source.randrange(2, vocabulary) for _ in range(count)]

    ids = [[*tokens(length - 1), EOS] for length in responses]
    labelled = [
        Candidate(
            token_ids=one,
            logprob_sum=-len(one) * math.log(vocabulary),
            finish_reason="stop",
            text="",
            verdict=Verdict.WRONG if number % 2 else Verdict.RIGHT,
            reward=float(number % 2 == 0),
        )
        for number, one in enumerate(ids[1:])
    ]
    return Group(1, 0, Question(name, "", "", "", "benchmark"), tokens(prompt), ids[0], labelled)
