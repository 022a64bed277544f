"""Requests of OpenAI's API that go to an engine's LLMServer directly, without the reasoner.

Invariant: such a request ends its responses, and renders its messages, as training did.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aft_ray.config.run import ModelConfig
from aft_ray.tasks.chat_template import SYSTEM_ROLES, template_values


def with_ends(request: Any, eos_token_ids: Sequence[int]) -> Any:
    """A copy of vLLM's chat or completion request that stops at the model's end tokens, and at its own."""
    stop = dict.fromkeys([*(request.stop_token_ids or ()), *eos_token_ids])
    return request.model_copy(update={"stop_token_ids": list(stop)})


def with_template_values(request: Any, model: ModelConfig) -> Any:
    """A copy of vLLM's chat request with the run's system prompt and values for the chat template.

    What the request itself gives takes precedence.
    """
    messages = list(request.messages)
    if model.system_prompt is not None and messages[0]["role"] not in SYSTEM_ROLES:
        messages.insert(0, {"role": "system", "content": model.system_prompt})
    values = template_values(model) | (request.chat_template_kwargs or {})
    return request.model_copy(update={"messages": messages, "chat_template_kwargs": values})
