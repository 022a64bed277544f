"""Turns questions into token ids.

Invariant: prompt and response are tokenized separately, so training sees the same boundary between them as sampling.
The reference response ends with exactly one end-of-sequence token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from aft_ray.config.run import ConfigError
from aft_ray.storage.records import Question
from aft_ray.tasks.base import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render(
    task: Task, question: Question, tokenizer: PreTrainedTokenizerBase, chat_template: Literal["auto", "never"]
) -> tuple[list[int], list[int]]:
    """The token ids of the prompt and of the reference response.

    Raises ConfigError when the tokenizer has no end-of-sequence token.
    """
    eos = end_of_sequence(tokenizer)
    reference_ids = tokenizer(question.reference, add_special_tokens=False)["input_ids"]
    return render_prompt(task.prompt(question), tokenizer, chat_template), [
        *_without_final_eos(reference_ids, eos),
        eos,
    ]


def render_prompt(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: Literal["auto", "never"],
    before: Sequence[Mapping[str, str]] = (),
) -> list[int]:
    """The token ids of a prompt.

    Args:
        chat_template: With "auto", the prompt becomes a user message in the tokenizer's chat template, if the
            tokenizer has one.
        before: The messages before the prompt, {"role", "content"} each. They are ignored without a chat template.
    """
    if chat_template == "auto" and tokenizer.chat_template:
        messages = [*before, {"role": "user", "content": prompt}]
        # transformers 5 returns a BatchEncoding by default.
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    # Without a template, the tokenizer adds its beginning-of-sequence token, if it has one.
    return _without_final_eos(tokenizer(prompt)["input_ids"], end_of_sequence(tokenizer))


def end_of_sequence(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the token that ends a response. Raises ConfigError when the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise ConfigError("the model's tokenizer has no end-of-sequence token; a response could never end")
    return int(tokenizer.eos_token_id)


def _without_final_eos(ids: list[int], eos: int) -> list[int]:
    """The ids without end-of-sequence tokens at their end, which some tokenizers add to every text."""
    end = len(ids)
    while end and ids[end - 1] == eos:
        end -= 1
    return list(ids[:end])
