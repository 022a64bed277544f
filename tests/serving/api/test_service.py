"""The service turns a chat into a prompt as training did, or says why it cannot. No engine is needed for that."""

from types import SimpleNamespace

import pytest
from instruct import instruct_model

from aft_ray.config.serve import load_serve_config
from aft_ray.serving.api.errors import ApiError
from aft_ray.serving.api.requests import ChatRequest
from aft_ray.serving.api.service import Service
from aft_ray.serving.api.telemetry import RequestRecord
from aft_ray.serving.model import resolve

KEYS = ["task.task=arithmetic", "engine.max_length=160", "access.open=true"]


@pytest.fixture
def service(tmp_path):
    """Makes the service of an instruct model. It gets a handle of engines that nothing is sent to."""

    def make(family: str, *keys: str) -> Service:
        config = load_serve_config(str(instruct_model(tmp_path / family, family)), None, [*KEYS, *keys])
        return Service(config, resolve(config)[0], SimpleNamespace(options=lambda **_: None))

    return make


def prompt_of(service: Service, *messages: tuple[str, str]) -> list[int]:
    chat = [{"role": role, "content": content} for role, content in messages]
    request = ChatRequest(model=service.served.name, messages=chat, max_tokens=20)
    return service.prepare_chat(request, RequestRecord("/v1/chat/completions", None)).prompt_token_ids


def test_a_chat_has_the_system_prompt_of_the_config_or_its_own(service):
    made = service("phi", "system_prompt=16 apples.")
    question = ("user", "Ana has 20 apples.")
    with_configured, with_own = prompt_of(made, question), prompt_of(made, ("system", "9 apples."), question)
    written_out = prompt_of(made, ("system", "16 apples."), question)
    assert with_configured == written_out
    assert with_own != with_configured


def test_a_chat_that_the_template_does_not_take_is_the_clients_mistake(service):
    made = service("gemma")
    assert prompt_of(made, ("user", "Ana has 20 apples."))
    with pytest.raises(ApiError) as refused:
        prompt_of(made, ("system", "9 apples."), ("user", "Ana has 20 apples."))
    assert refused.value.status == 400
    error = refused.value.body["error"]
    assert error["param"] == "messages"
    assert error["message"].endswith("the model's chat template refuses these messages: System role not supported")
