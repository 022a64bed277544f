"""What clients may send, in our own shape and in OpenAI's, and what an error looks like.

Invariant: a field that would change the answer is either honoured or refused by name; none is silently dropped. Fields
of OpenAI's API that could not change it are taken and listed as ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from aft_ray.config.serve import AnsweringConfig, Strategy


def _writable(text: str) -> str:
    """JSON can spell halves of characters, which no tokenizer can take."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it has half of a surrogate pair, which is no text") from None
    return text


Text = Annotated[str, Field(min_length=1), AfterValidator(_writable)]
# vLLM takes no more.
Temperature = Annotated[float, Field(ge=0, le=2)]
TopP = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**62)]
Count = Annotated[int, Field(ge=1)]
Confidence = Annotated[float, Field(ge=0.5, le=1)]


def _configured(key: str) -> str | None:
    """The description of the key of `answering` that a field of the same name overrides."""
    return AnsweringConfig.model_fields[key].description


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())

    task: str | None = Field(None, description="which of the model's tasks; none: its first")
    strategy: Strategy | None = Field(None, description=_configured("strategy"))
    temperature: Temperature | None = Field(None, description=_configured("temperature"))
    top_p: TopP | None = Field(None, description=_configured("top_p"))
    seed: Seed | None = Field(None, description="fixes the candidates; none: drawn, and told in the answer")
    max_tokens: Count | None = Field(None, description=_configured("max_tokens"))
    stop_confidence: Confidence | None = Field(None, description=_configured("stop_confidence"))
    stream: bool | None = Field(False, description="server-sent events")


class ReasonRequest(_Request):
    """A question, and how to answer it; what is left out is as the service is configured."""

    asked_in: ClassVar[str] = "question"
    question: Text
    model: str | None = Field(None, description="the served model's name; none: whatever is served")
    n: Count | None = Field(None, description="candidates to sample")

    @property
    def candidates(self) -> int | None:
        return self.n

    @property
    def names(self) -> dict[str, str]:
        """What the client called a number that is bounded by the service."""
        return {}


# Fields of OpenAI's API that change what is generated, with the value that asks for nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "stop": (None, [], ""),
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


def _wrong(param: str, sentence: str) -> PydanticCustomError:
    """What is wrong with a field that only the whole request shows. The sentence names the field."""
    return PydanticCustomError("wrong_together", "{sentence}", {"sentence": sentence, "param": param})


class StreamOptions(BaseModel):
    include_usage: bool | None = False


class _OpenAiRequest(_Request):
    model_config = ConfigDict(extra="allow")

    model: str = Field(description="the served model's name")
    n: Count | None = Field(1, description="choices to return, the best candidates first")
    best_of: Count | None = Field(None, description="candidates to sample, of which the best are returned")
    include_candidates: bool = Field(False, description="return all candidates in the field `aft_ray`")
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _nothing_unsupported(self) -> _OpenAiRequest:
        for name, idle in _REFUSED.items():
            value = (self.model_extra or {}).get(name)
            if value not in idle:
                sentence = f"{name} is not supported: answers are ranked whole, by the scores of whole responses"
                raise _wrong(name, sentence)
        if self.best_of is not None and self.n is not None and self.best_of < self.n:
            raise _wrong("best_of", f"best_of ({self.best_of}) is less than n ({self.n})")
        return self

    @property
    def candidates(self) -> int | None:
        """As many as are asked for, and never fewer than are to be returned."""
        return self.best_of

    @property
    def names(self) -> dict[str, str]:
        return {} if self.best_of is None else {"n": "best_of"}

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def ignored(self) -> list[str]:
        return sorted(set(self.model_extra or {}) - set(_REFUSED))


class TextPart(BaseModel):
    type: Literal["text"]
    text: Annotated[str, AfterValidator(_writable)]


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, AfterValidator(_writable)] | list[TextPart]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_OpenAiRequest):
    """OpenAI's chat completion. The last message is the question."""

    asked_in: ClassVar[str] = "messages"
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = Field(None, description="the newer name of max_tokens")

    @model_validator(mode="after")
    def _ends_with_a_question(self) -> ChatRequest:
        if self.messages[-1].role != "user" or not self.messages[-1].text.strip():
            raise _wrong("messages", "the last message must be the user's, with the question as its text")
        return self

    @property
    def names(self) -> dict[str, str]:
        newer = {} if self.max_completion_tokens is None else {"max_tokens": "max_completion_tokens"}
        return super().names | newer


class CompletionRequest(_OpenAiRequest):
    """OpenAI's completion. The prompt goes to the model as it is, without the task's own prompt around it."""

    asked_in: ClassVar[str] = "prompt"
    prompt: Text | list[Text] | list[int] | list[list[int]]

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


ErrorType = Literal[
    "invalid_request_error",
    "authentication_error",
    "not_found_error",
    "rate_limit_error",
    "timeout_error",
    "server_error",
]


class Refusal(Exception):
    """Any answer but the wanted one: an HTTP status and OpenAI's error body."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: ErrorType = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        """Retry-After in whole seconds, where trying again helps; the scheme, where a key is missing."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(max(1, round(self.retry_after_s)))}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})
