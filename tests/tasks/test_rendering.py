"""Prompt and reference as token ids are tokenized separately, with one end-of-sequence token at the end."""

import copy

import pytest
from transformers import PreTrainedTokenizerFast

from aft_ray.config.run import ConfigError, DataConfig
from aft_ray.storage.records import Question
from aft_ray.tasks import build_task
from aft_ray.tasks.rendering import render

TASK = build_task(DataConfig(), 0)
QUESTION = Question("q", "Ana has 16 apples.", "16 + 4 = 20. #### 20", "20", "arithmetic")


@pytest.fixture
def chat(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = (
        "{% for m in messages %}Ben has {{ m.content }}{% endfor %}{% if add_generation_prompt %} Dan{% endif %}"
    )
    return chat


def test_plain(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt, reference = render(TASK, QUESTION, tokenizer, "auto")
    assert tokenizer.decode(prompt) == QUESTION.text
    assert tokenizer.decode(reference, skip_special_tokens=True) == QUESTION.reference
    assert tokenizer.decode(prompt + reference[:-1]) == f"{QUESTION.text} {QUESTION.reference}"
    assert reference.count(tokenizer.eos_token_id) == 1
    assert reference[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in prompt


def test_through_the_chat_template_when_there_is_one(chat: PreTrainedTokenizerFast) -> None:
    prompt, reference = render(TASK, QUESTION, chat, "auto")
    assert all(isinstance(token, int) for token in prompt)
    assert chat.decode(prompt) == f"Ben has {QUESTION.text} Dan"
    assert render(TASK, QUESTION, chat, "never")[0] != prompt
    assert render(TASK, QUESTION, chat, "never")[1] == reference


def test_a_reference_that_has_the_end_already(tokenizer: PreTrainedTokenizerFast) -> None:
    ended = Question("q", "Ana has 16 apples.", QUESTION.reference + tokenizer.eos_token, "20", "arithmetic")
    assert render(TASK, ended, tokenizer, "auto") == render(TASK, QUESTION, tokenizer, "auto")


def test_a_tokenizer_without_an_end(tokenizer: PreTrainedTokenizerFast) -> None:
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        render(TASK, QUESTION, endless, "auto")
