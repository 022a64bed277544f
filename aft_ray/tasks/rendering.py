"""From a question to token ids.

Invariant: prompt and response are tokenised separately, so the boundary between them is where a sampler starts; the
reference ends with the end-of-sequence token, exactly once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from aft_ray.config import ConfigError
from aft_ray.records import Question
from aft_ray.tasks.base import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render(
    task: Task, question: Question, tokenizer: PreTrainedTokenizerBase, chat_template: Literal["auto", "never"]
) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the reference response.

    With chat_template "auto" the prompt is a user's turn in the tokenizer's chat template, where it has one.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ConfigError("the model's tokenizer has no end-of-sequence token; a response could never end")
    prompt = task.prompt(question)
    if chat_template == "auto" and tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        # return_dict=False: transformers 5 gives a BatchEncoding by default.
        prompt_ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    else:
        prompt_ids = tokenizer(prompt)["input_ids"]  # with the start token where the tokenizer has one
        prompt_ids = _without_end(prompt_ids, eos)
    reference_ids = tokenizer(question.reference, add_special_tokens=False)["input_ids"]
    return list(prompt_ids), [*_without_end(reference_ids, eos), eos]


def _without_end(ids: list[int], eos: int) -> list[int]:
    """Some tokenizers close every text with the end-of-sequence token."""
    end = len(ids)
    while end and ids[end - 1] == eos:
        end -= 1
    return list(ids[:end])
