"""Prompt and reference as token ids are tokenized separately; the reference ends with exactly one end token."""

import copy
from datetime import date

import pytest
from instruct import FAMILIES, instruct_tokenizer
from tiny import tiny_config
from transformers import PreTrainedTokenizerFast

from aft_ray.config.run import ConfigError, DataConfig
from aft_ray.storage.records import Question
from aft_ray.tasks import build_task
from aft_ray.tasks.chat_template import TemplateRefusal
from aft_ray.tasks.rendering import Renderer

TASK = build_task(DataConfig(), 0)
QUESTION = Question("q", "Ana has 16 apples.", "16 + 4 = 20. #### 20", "20", "arithmetic")


@pytest.fixture
def renderer(tiny_model, tmp_path):
    """Makes a renderer of a tokenizer and of keys of the config's `model`."""

    def make(tokenizer: PreTrainedTokenizerFast, **model) -> Renderer:
        return Renderer(tiny_config(tmp_path, tiny_model, model=model), tokenizer)

    return make


@pytest.fixture
def chat(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = (
        "{% for m in messages %}Ben has {{ m.content }}{% endfor %}{% if add_generation_prompt %} Dan{% endif %}"
    )
    return chat


def test_plain(renderer, tokenizer) -> None:
    prompt, reference = renderer(tokenizer).question(TASK, QUESTION)
    assert tokenizer.decode(prompt) == QUESTION.text
    assert tokenizer.decode(reference, skip_special_tokens=True) == QUESTION.reference
    assert tokenizer.decode(prompt + reference[:-1]) == f"{QUESTION.text} {QUESTION.reference}"
    assert reference.count(tokenizer.eos_token_id) == 1
    assert reference[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in prompt


def test_through_the_chat_template_when_there_is_one(renderer, chat) -> None:
    prompt, reference = renderer(chat).question(TASK, QUESTION)
    assert all(isinstance(token, int) for token in prompt)
    assert chat.decode(prompt) == f"Ben has {QUESTION.text} Dan"
    never = renderer(chat, chat_template="never").question(TASK, QUESTION)
    assert never[0] != prompt
    assert never[1] == reference


def test_a_reference_that_has_the_end_already(renderer, tokenizer) -> None:
    ended = Question("q", "Ana has 16 apples.", QUESTION.reference + tokenizer.eos_token, "20", "arithmetic")
    assert renderer(tokenizer).question(TASK, ended) == renderer(tokenizer).question(TASK, QUESTION)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_reference_ends_as_the_assistants_turn_does(renderer, name) -> None:
    tokenizer, family = instruct_tokenizer(name), FAMILIES[name]
    made = renderer(tokenizer)
    for already in ("", family.end, tokenizer.eos_token):
        question = Question("q", QUESTION.text, QUESTION.reference + already, "20", "arithmetic")
        _, reference = made.question(TASK, question)
        assert tokenizer.convert_ids_to_tokens(reference[-1]) == family.end
        assert not set(reference[:-1]) & set(made.ends.ids)
        assert made.text(reference) == QUESTION.reference
    # What training sees is what the template makes of the same conversation.
    conversation = [
        {"role": "user", "content": QUESTION.text},
        {"role": "assistant", "content": QUESTION.reference},
    ]
    rendered = tokenizer.decode(tokenizer.apply_chat_template(conversation, return_dict=False))
    prompt, reference = made.question(TASK, QUESTION)
    assert rendered.replace(" ", "").startswith(tokenizer.decode(prompt + reference).replace(" ", ""))


def test_a_template_is_told_the_day_of_the_config_and_not_todays(renderer) -> None:
    tokenizer = instruct_tokenizer("llama3")
    dated = renderer(tokenizer, template_date="2019-07-08").prompt("Ana")
    assert "08" in tokenizer.decode(dated)
    assert "2019" in tokenizer.decode(dated)
    assert dated == renderer(tokenizer, template_date=date(2019, 7, 8)).prompt("Ana")
    assert dated != renderer(tokenizer).prompt("Ana")
    # transformers' own clock is untouched.
    today = tokenizer.apply_chat_template([{"role": "user", "content": "Ana"}], tokenize=False)
    assert str(date.today().year) in today


def test_values_of_the_config_reach_the_template(renderer) -> None:
    tokenizer = instruct_tokenizer("chatml")
    quiet = renderer(tokenizer, chat_template_kwargs={"enable_thinking": False}).prompt("Ana")
    assert "</think>" in tokenizer.decode(quiet)
    assert "</think>" not in tokenizer.decode(renderer(tokenizer).prompt("Ana"))
    assert "</think>" not in tokenizer.decode(
        renderer(tokenizer, chat_template_kwargs={"enable_thinking": True}).prompt("Ana")
    )


def test_the_system_prompt_comes_first_unless_the_conversation_has_one(renderer) -> None:
    tokenizer = instruct_tokenizer("llama3")
    made = renderer(tokenizer, system_prompt="16 apples")
    assert "16 apples" in tokenizer.decode(made.prompt("Ana"))
    other = made.prompt("Ana", [{"role": "system", "content": "20 apples"}])
    assert "16 apples" not in tokenizer.decode(other)
    assert "20 apples" in tokenizer.decode(other)


@pytest.mark.parametrize(
    ("name", "model", "sentence"),
    [
        ("gemma", {"system_prompt": "Ana"}, "no.*|that of .* has none; write the text into the task's prompt"),
        ("mistral", {"system_prompt": "Ana"}, "needs a chat template with a system role"),
        ("chatml", {"chat_template_kwargs": {"enable_thinkin": True}}, "enable_thinkin, which .* never uses"),
        # A message's attribute of this name is no variable of the template.
        ("llama3", {"chat_template_kwargs": {"content": "x"}}, "content, which .* never uses"),
    ],
)
def test_what_the_template_would_not_use_is_refused(renderer, name, model, sentence) -> None:
    with pytest.raises(ConfigError, match=sentence):
        renderer(instruct_tokenizer(name), **model)


@pytest.mark.parametrize("model", [{"system_prompt": "Ana"}, {"chat_template_kwargs": {"enable_thinking": True}}])
def test_keys_for_a_template_need_one(renderer, tokenizer, model) -> None:
    with pytest.raises(ConfigError, match=f"model.{next(iter(model))} is for a chat template, and .* has none"):
        renderer(tokenizer, **model)


def test_a_template_that_needs_a_value_says_so_before_the_run(renderer, chat) -> None:
    chat.chat_template = (
        "{% if not style %}{{ raise_exception('style is missing') }}{% endif %}{{ messages[0].content }}"
    )
    with pytest.raises(ConfigError, match=r"cannot render a question \(style is missing\)"):
        renderer(chat)
    assert chat.decode(renderer(chat, chat_template_kwargs={"style": "terse"}).prompt("Ana")) == "Ana"


def test_messages_that_the_template_does_not_take_are_named(renderer) -> None:
    with pytest.raises(TemplateRefusal, match="System role not supported"):
        renderer(instruct_tokenizer("gemma")).prompt("Ana", [{"role": "system", "content": "Ben"}])
