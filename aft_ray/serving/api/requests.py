"""The bodies of requests, in our own format and in OpenAI's.

Invariant: a field that would change the answer is either honoured or rejected by name; none is silently dropped. Fields
of OpenAI's API that could not change the answer are accepted and listed as ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from aft_ray.config.serve import AnsweringConfig, Strategy


def _valid_unicode(text: str) -> str:
    """Returns the text. Raises ValueError for half of a surrogate pair, which JSON can hold and tokenizers reject."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it contains half of a surrogate pair, which is not text") from None
    return text


Text = Annotated[str, Field(min_length=1), AfterValidator(_valid_unicode)]
# vLLM accepts temperatures up to 2.
Temperature = Annotated[float, Field(ge=0, le=2)]
TopP = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**62)]
# Strict, since `true` is no token.
TokenId = Annotated[int, Field(strict=True)]
Count = Annotated[int, Field(ge=1)]
Confidence = Annotated[float, Field(ge=0.5, le=1)]


def _config_description(key: str) -> str | None:
    """Returns the description of the config key of `answering` that the field of the same name overrides."""
    return AnsweringConfig.model_fields[key].description


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())

    task: str | None = Field(None, description="one of the model's tasks; none: the first")
    strategy: Strategy | None = Field(None, description=_config_description("strategy"))
    temperature: Temperature | None = Field(None, description=_config_description("temperature"))
    top_p: TopP | None = Field(None, description=_config_description("top_p"))
    seed: Seed | None = Field(None, description="fixes the candidates; none: a random seed, which the answer names")
    max_tokens: Count | None = Field(None, description=_config_description("max_tokens"))
    stop_confidence: Confidence | None = Field(None, description=_config_description("stop_confidence"))
    stream: bool | None = Field(False, description="answer with server-sent events")


class ReasonRequest(_Request):
    """A question and how to answer it; a field that is left out has the value that the service is configured with."""

    question_field: ClassVar[str] = "question"
    question: Text
    model: str | None = Field(None, description="the served model's name; none: the model that is served")
    n: Count | None = Field(None, description="candidates to sample")

    @property
    def candidates(self) -> int | None:
        return self.n

    @property
    def client_names(self) -> dict[str, str]:
        """The client's name of a bounded number, where that is not the number's own name."""
        return {}


# Fields of OpenAI's API that change what is generated, each with the values that leave it off.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "stop": (None, [], ""),
    "stop_token_ids": (None, []),
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "echo": (None, False),
    "suffix": (None, ""),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "prediction": (None,),
}


# Fields by which clients of vLLM change how a chat becomes a prompt, each with the values that leave it off.
_FIXED_BY_TRAINING: dict[str, tuple[Any, ...]] = {
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
    "documents": (None, []),
    "add_generation_prompt": (None, True),
    "continue_final_message": (None, False),
}


def _field_error(param: str, sentence: str) -> PydanticCustomError:
    """Returns a mistake that shows only in the whole request. The sentence names the field `param`."""
    return PydanticCustomError("invalid_request", "{sentence}", {"sentence": sentence, "param": param})


class StreamOptions(BaseModel):
    include_usage: bool | None = False


class _OpenAiRequest(_Request):
    model_config = ConfigDict(extra="allow")

    model: str = Field(description="the served model's name")
    n: Count | None = Field(1, description="choices to return: the best candidates, best first")
    best_of: Count | None = Field(None, description="candidates to sample, of which the n best are returned")
    include_candidates: bool = Field(False, description="return all candidates in the field `aft_ray`")
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _reject_unsupported(self) -> _OpenAiRequest:
        for name, allowed in _UNSUPPORTED.items():
            value = (self.model_extra or {}).get(name)
            if value not in allowed:
                sentence = f"{name} is not supported: answers are ranked whole, by the scores of whole responses"
                raise _field_error(name, sentence)
        for name, allowed in _FIXED_BY_TRAINING.items():
            if (self.model_extra or {}).get(name) not in allowed:
                sentence = f"{name} is not supported: the model is asked in the way in which it was trained"
                raise _field_error(name, sentence)
        if self.best_of is not None and self.n is not None and self.best_of < self.n:
            raise _field_error("best_of", f"best_of ({self.best_of}) is less than n ({self.n})")
        return self

    @property
    def candidates(self) -> int | None:
        """The number of candidates to sample; None: the service's default, or `choices` if that is larger."""
        return self.best_of

    @property
    def client_names(self) -> dict[str, str]:
        return {} if self.best_of is None else {"n": "best_of"}

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def ignored(self) -> list[str]:
        return sorted(set(self.model_extra or {}) - set(_UNSUPPORTED) - set(_FIXED_BY_TRAINING))


class TextPart(BaseModel):
    type: Literal["text"]
    text: Annotated[str, AfterValidator(_valid_unicode)]


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, AfterValidator(_valid_unicode)] | list[TextPart]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_OpenAiRequest):
    """OpenAI's chat completion. The last message is the question."""

    question_field: ClassVar[str] = "messages"
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = Field(None, description="the newer name of max_tokens")

    @model_validator(mode="after")
    def _last_message_is_a_question(self) -> ChatRequest:
        if self.messages[-1].role != "user" or not self.messages[-1].text.strip():
            raise _field_error("messages", "the last message must be the user's, with the question as its text")
        return self

    @property
    def client_names(self) -> dict[str, str]:
        newer = {} if self.max_completion_tokens is None else {"max_tokens": "max_completion_tokens"}
        return super().client_names | newer


class CompletionRequest(_OpenAiRequest):
    """OpenAI's completion. The prompt is passed to the model unchanged, without the task's prompt template."""

    question_field: ClassVar[str] = "prompt"
    prompt: Text | list[Text] | list[TokenId] | list[list[TokenId]]

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]
