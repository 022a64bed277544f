"""A field that would change the prompt or the end of a response is refused; none is dropped in silence."""

import pytest
from pydantic import ValidationError

from aft_ray.serving.api.requests import ChatRequest

CHAT = {"model": "m", "messages": [{"role": "user", "content": "How many?"}]}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("chat_template_kwargs", {"enable_thinking": True}),
        ("chat_template", "{{ messages }}"),
        ("continue_final_message", True),
        ("add_generation_prompt", False),
        ("stop_token_ids", [5]),
    ],
)
def test_what_would_change_the_prompt_or_the_end_is_refused(field, value):
    with pytest.raises(ValidationError, match=f"{field} is not supported"):
        ChatRequest(**CHAT, **{field: value})


def test_the_same_fields_without_effect_are_taken():
    request = ChatRequest(**CHAT, chat_template_kwargs={}, stop_token_ids=[], add_generation_prompt=True, user="me")
    assert request.ignored == ["user"]
