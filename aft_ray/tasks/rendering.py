"""From a question to token ids.

Invariant: prompt and response are tokenised separately, so the boundary between them is where a sampler starts; the
reference ends with the end-of-sequence token, exactly once.
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
    """Token ids of the prompt and of the reference response. Raises ConfigError for a tokenizer without an end."""
    eos = end_of_sequence(tokenizer)
    reference_ids = tokenizer(question.reference, add_special_tokens=False)["input_ids"]
    return render_prompt(task.prompt(question), tokenizer, chat_template), [*_without_end(reference_ids, eos), eos]


def render_prompt(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: Literal["auto", "never"],
    before: Sequence[Mapping[str, str]] = (),
) -> list[int]:
    """Token ids of a prompt. With chat_template "auto" it is a user's turn in the tokenizer's chat template, where it
    has one, after the turns `before`: {"role", "content"} each, which are left out without a template.
    """
    if chat_template == "auto" and tokenizer.chat_template:
        turns = [*before, {"role": "user", "content": prompt}]
        # return_dict=False: transformers 5 gives a BatchEncoding by default.
        return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))
    # With the start token where the tokenizer has one.
    return _without_end(tokenizer(prompt)["input_ids"], end_of_sequence(tokenizer))


def end_of_sequence(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a response. Raises ConfigError when there is none."""
    if tokenizer.eos_token_id is None:
        raise ConfigError("the model's tokenizer has no end-of-sequence token; a response could never end")
    return int(tokenizer.eos_token_id)


def _without_end(ids: list[int], eos: int) -> list[int]:
    """Some tokenizers close every text with the end-of-sequence token."""
    end = len(ids)
    while end and ids[end - 1] == eos:
        end -= 1
    return list(ids[:end])
