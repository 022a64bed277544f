"""The tokens that end a response: of the tokenizer, the generation config and the chat template, all together."""

import copy
import json
import shutil

import pytest
from instruct import FAMILIES, instruct_tokenizer
from tiny import tiny_config

from aft_ray.config.run import ConfigError
from aft_ray.tasks.response_end import response_ends, response_text, without_end


@pytest.fixture
def model(tiny_model, tmp_path):
    """A copy of the model directory, whose files a test may change."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def ends(model, tokenizer, **keys):
    return response_ends(tiny_config(model.parent, model, model=keys), tokenizer)


def set_generation_eos(model, eos) -> None:
    path = model / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": eos}))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_turn_end_of_the_template_is_one_of_them(model, name) -> None:
    tokenizer, end = instruct_tokenizer(name), FAMILIES[name].end
    found = ends(model, tokenizer)
    assert set(tokenizer.convert_ids_to_tokens(list(found.ids))) == {"<eos>", end}
    assert tokenizer.convert_ids_to_tokens(found.reference) == end
    # Without the template the model may still end its turn in this way, but references end as text does.
    plain = ends(model, tokenizer, chat_template="never")
    assert plain.ids == found.ids
    assert plain.reference == tokenizer.eos_token_id


@pytest.mark.parametrize("eos", [7, [1, 7], [7, 9]])
def test_those_of_the_generation_config_are_too(model, tokenizer, eos) -> None:
    set_generation_eos(model, eos)
    found = ends(model, tokenizer)
    assert set(found.ids) == {tokenizer.eos_token_id, *([eos] if isinstance(eos, int) else eos)}
    assert found.reference == tokenizer.eos_token_id


def test_without_a_generation_config_those_of_the_models_config(model, tokenizer) -> None:
    (model / "generation_config.json").unlink()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": [1, 8]}))
    assert ends(model, tokenizer).ids == (1, 8)


@pytest.mark.parametrize("eos", [None, -1, 10**6, []])
def test_an_id_that_is_no_token_is_left_out(model, tokenizer, eos) -> None:
    set_generation_eos(model, eos)
    assert ends(model, tokenizer).ids == (tokenizer.eos_token_id,)


def test_a_model_with_a_turn_end_needs_no_other(model) -> None:
    set_generation_eos(model, None)
    tokenizer = instruct_tokenizer("chatml")
    tokenizer.eos_token = None
    found = ends(model, tokenizer)
    assert found.ids == (found.reference,)
    assert tokenizer.convert_ids_to_tokens(found.reference) == "<|im_end|>"


def test_a_model_without_any(model, tokenizer) -> None:
    set_generation_eos(model, None)
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        ends(model, endless)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role + ' ' + m.content + '\n' }}{% endfor %}",  # a turn ends with a line
        "{{ messages[-1].content + ' End' }}",  # a turn ends with a word
        "{{ messages[0].content }}",  # questions alone
        "{% if messages[-1].role != 'user' %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}",
    ],
)
def test_a_template_that_ends_no_turn_with_a_token_adds_none(model, tokenizer, template) -> None:
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = template
    assert ends(model, chat).ids == (tokenizer.eos_token_id,)


def test_space_before_the_turn_end_is_passed_over(model) -> None:
    tokenizer = instruct_tokenizer("chatml")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + ' \n<|im_end|>\n' }}{% endfor %}"
    assert tokenizer.convert_ids_to_tokens(ends(model, tokenizer).reference) == "<|im_end|>"


def test_several_templates_of_which_none_is_the_default(model, tokenizer) -> None:
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = {"rag": "{{ messages[0].content }}", "tool_use": "{{ messages[0].content }}"}
    with pytest.raises(ConfigError, match="several chat templates and no default one"):
        ends(model, chat)
    assert ends(model, chat, chat_template="never").ids == (tokenizer.eos_token_id,)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_end_does_not_belong_to_the_text(model, name) -> None:
    tokenizer = instruct_tokenizer(name)
    found = ends(model, tokenizer)
    words = tokenizer("16 apples.")["input_ids"]
    assert {response_text(tokenizer, [*words, end], found.ids) for end in found.ids} == {"16 apples."}
    assert response_text(tokenizer, words, found.ids) == "16 apples."
    assert without_end([found.ids[0]], found.ids) == []
