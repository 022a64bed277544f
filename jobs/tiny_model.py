"""Builds a tokenizer and an untrained tiny Llama for the arithmetic task, so that a whole run needs no download.

Invariants: the vocabulary covers every text that the generator can write. Decoding returns the encoded text, and each
digit is one token. A token that starts a word includes the space before it ("▁"), so decoded digits form the same
numbers again.
"""

from __future__ import annotations

import re
from pathlib import Path
from string import digits
from typing import TYPE_CHECKING

from aft_ray.tasks.arithmetic.problems import (
    DISTRACTORS,
    FINAL_QUESTION,
    NAMES,
    OBJECTS,
    SENTENCES,
    START,
    TERSE,
    WORDINGS,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
_SPACE = "▁"
_PIECE = rf"{_SPACE}?(?:[0-9]|[A-Za-z]+|#+|[^A-Za-z0-9#{_SPACE}])|{_SPACE}"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The word-level tokenizer of the arithmetic task. AutoTokenizer can load it after `save_pretrained`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(_vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always", split=False),
            pre_tokenizers.Split(Regex(_PIECE), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme="always")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


def build_tiny_model(
    directory: str | Path,
    seed: int,
    hidden_size: int = 128,
    layers: int = 4,
    heads: int = 4,
    tied: bool = True,
    max_length: int = 256,
) -> Path:
    """Writes a randomly initialised Llama (float32 safetensors) and its tokenizer; returns the directory.

    Args:
        seed: The seed of the weights.
        hidden_size: A multiple of `heads`. The head size `hidden_size / heads` must be 32, 64 or 128, which are the
            sizes that vLLM's CPU attention supports.
        tied: Whether input and output embeddings are the same tensor.
        max_length: The context length in tokens.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=-(-hidden_size * 8 // 24) * 8,  # Llama's factor 8/3, rounded up to a multiple of 8.
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=tied,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).float()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(directory)
    tokenizer.model_max_length = max_length
    tokenizer.save_pretrained(directory)
    return Path(directory)


def _vocabulary() -> list[str]:
    """The special tokens, the digits at the start of and inside a word, and all pieces of the generator's templates."""
    templates = [START, FINAL_QUESTION, TERSE, *DISTRACTORS, *NAMES, *OBJECTS, "####"]
    templates += [text for texts in (*SENTENCES.values(), *WORDINGS.values()) for text in texts]
    pieces = {_SPACE + digit for digit in digits} | set(digits)
    for template in templates:
        text = re.sub(r"\{\w+\}", "0", template)  # A number replaces each field.
        pieces.update(re.findall(_PIECE, _SPACE + text.replace(" ", _SPACE)))
    return [PAD, EOS, UNKNOWN, *sorted(pieces)]
