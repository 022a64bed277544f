"""A request that goes to an engine's LLMServer directly ends and renders as in training; vLLM's own classes read it."""

import pytest
from instruct import instruct_tokenizer

from aft_ray.config.run import ModelConfig
from aft_ray.serving.engine.openai_requests import with_ends, with_template_values
from aft_ray.tasks.chat_template import ChatTemplate

QUESTION = {"role": "user", "content": "Ana has 16 apples."}
MODEL = ModelConfig(name="m", system_prompt="Be brief.", template_date="2019-07-08")


@pytest.fixture
def chat():
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    return lambda **fields: ChatCompletionRequest(model="m", **{"messages": [QUESTION], **fields})


def rendered(request) -> str:
    """The text that vLLM's renderer makes of a chat."""
    from vllm.renderers.hf import resolve_chat_template_kwargs

    tokenizer = instruct_tokenizer("llama3")
    values = resolve_chat_template_kwargs(tokenizer, tokenizer.chat_template, request.chat_template_kwargs)
    return tokenizer.apply_chat_template(request.messages, add_generation_prompt=True, tokenize=False, **values)


def test_vllm_stops_at_the_ends_of_the_model_and_at_those_of_the_request(chat):
    request = with_ends(chat(stop_token_ids=[9]), (1, 100))
    parameters = request.to_sampling_params(max_tokens=8, default_sampling_params={})
    assert parameters.stop_token_ids == [9, 1, 100]
    assert with_ends(chat(), (1,)).stop_token_ids == [1]


def test_a_completion_stops_there_too():
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    request = with_ends(CompletionRequest(model="m", prompt="Ana"), (1, 100))
    assert request.to_sampling_params(8, default_sampling_params={}).stop_token_ids == [1, 100]


def test_a_chat_is_rendered_as_in_training(chat):
    template = ChatTemplate.of(instruct_tokenizer("llama3"), MODEL)
    assert rendered(with_template_values(chat(), MODEL)) == template.render([QUESTION])


def test_what_the_request_gives_takes_precedence(chat):
    own = [{"role": "system", "content": "Be exact."}, QUESTION]
    request = with_template_values(chat(messages=own, chat_template_kwargs={"date_string": "today"}), MODEL)
    text = rendered(request)
    assert "Be exact." in text
    assert "Be brief." not in text
    assert "Today Date: today" in text
