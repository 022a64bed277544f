"""Random models and groups of any size for the acceptance suite. The same arguments give the same ones everywhere."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aft_ray.planning.plan.architecture import Architecture
from aft_ray.storage.records import Candidate, Group, Question, Verdict

PAD, EOS = 0, 1


@dataclass(frozen=True, slots=True)
class GroupShape:
    """The sizes of random groups, in tokens; each length is drawn between its two numbers."""

    groups: int
    k: int
    prompt: tuple[int, int]
    response: tuple[int, int]


def transformers_config(sizes: Architecture, **options: Any) -> Any:
    """The config of transformers for a model of these sizes; `options` are further keys of it."""
    from transformers import AutoConfig

    return AutoConfig.for_model(
        sizes.family,
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_size,
        max_position_embeddings=sizes.context,
        tie_word_embeddings=sizes.tied,
        **options,
    )


def write_random_model(directory: Path, sizes: Architecture, device: str, spread: float = 0.02, seed: int = 0) -> Path:
    """Writes a model of Llama's architecture with random bfloat16 weights.

    Args:
        device: where the weights are drawn.
        spread: the standard deviation of the weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = transformers_config(sizes, initializer_range=spread, pad_token_id=PAD, bos_token_id=None, eos_token_id=EOS)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    return directory


def random_groups(shape: GroupShape, vocabulary: int, seed: int = 0) -> list[Group]:
    """Groups whose candidates are right and wrong in turn, so that an objective has pairs to compare in each."""
    source = random.Random(seed)

    def ids(lengths: tuple[int, int]) -> list[int]:
        return [source.randrange(2, vocabulary) for _ in range(source.randint(*lengths))]

    groups = []
    for number in range(shape.groups):
        candidates = []
        for slot in range(shape.k):
            verdict = Verdict.WRONG if slot % 2 else Verdict.RIGHT
            response = ids(shape.response)
            candidates.append(
                Candidate(response, -4.0 * len(response), "stop", "", None, verdict, float(verdict is Verdict.RIGHT))
            )
        question = Question(f"question-{number}", "", "", "", "random")
        groups.append(Group(1, 0, question, ids(shape.prompt), ids(shape.response), candidates))
    return groups


def write_character_tokenizer(directory: Path) -> None:
    """Writes a tokenizer with one token for each printable character, for runs on generated questions."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = ["\n", *map(chr, range(32, 127))]
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(directory)
