"""Tokenizers of instruct models: the vocabulary of the arithmetic task with control tokens and a chat template.

Each template has the form of a known family: how turns begin and end, whether there is a system role, and what the
template asks for besides the messages.
"""

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jobs.tiny_model import build_tiny_model, build_tokenizer


@dataclass(frozen=True)
class Family:
    """Attributes:
    end: the token that ends the assistant's turn.
    controls: the control tokens of the template besides `end`.
    special: whether the tokenizer marks them as special.
    """

    template: str
    end: str
    controls: tuple[str, ...]
    special: bool = True


FAMILIES = {
    "gemma": Family(
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for message in messages %}"
        "{% set role = 'model' if message.role == 'assistant' else message.role %}"
        "{{ '<start_of_turn>' + role + '\n' + message.content | trim + '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        "<end_of_turn>",
        ("<start_of_turn>",),
    ),
    "phi": Family(
        "{% for message in messages %}{{ '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        "<|end|>",
        ("<|system|>", "<|user|>", "<|assistant|>"),
        special=False,
    ),
    "llama3": Family(
        "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
        "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' }}"
        "{{ system + '<|eot_id|>' }}"
        "{% for message in messages %}"
        "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>"),
    ),
    "chatml": Family(
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{% endif %}",
        "<|im_end|>",
        ("<|im_start|>", "<think>", "</think>"),
    ),
    # The turn ends with the tokenizer's own end-of-sequence token.
    "mistral": Family(
        "{% for message in messages %}{% if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}"
        "{% elif message.role == 'assistant' %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}",
        "<eos>",
        ("[INST]", "[/INST]"),
    ),
}


def instruct_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a family."""
    family, tokenizer = FAMILIES[name], build_tokenizer()
    tokenizer.add_tokens(
        [token for token in (*family.controls, family.end) if token not in tokenizer.get_vocab()],
        special_tokens=family.special,
    )
    tokenizer.chat_template = family.template
    return tokenizer


def instruct_model(directory: Path, name: str, seed: int = 1, **sizes: int) -> Path:
    """A random tiny model with the tokenizer of a family. Its generation config knows the tokenizer's end alone."""
    import torch
    from transformers import AutoModelForCausalLM

    build_tiny_model(directory, seed, **{"hidden_size": 64, "layers": 2, "heads": 2, "max_length": 160, **sizes})
    tokenizer = instruct_tokenizer(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(directory)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    AutoTokenizer.from_pretrained(directory)
    return directory
