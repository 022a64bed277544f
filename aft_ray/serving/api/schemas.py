"""What answers look like, for the OpenAPI document.

Invariant: every answer has exactly the fields listed here. Nothing is checked against these while serving; the tests do
it with what the running service sends.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from aft_ray.config.serve import AnsweringConfig, Strategy
from aft_ray.serving.api.requests import ErrorType
from aft_ray.serving.reasoning import Stopped

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]
Version = Annotated[
    int | None, Field(description="policy version that made all candidates; null: the model is of no run")
]
FinishReason = Literal["stop", "length"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(_Part):
    message: str = Field(description="one sentence")
    type: ErrorType
    param: str | None = Field(description="the field that is wrong")
    code: str | None


class Error(_Part):
    """Every answer that is not the wanted one."""

    error: ErrorDetail


class Candidate(_Part):
    """A sampled response."""

    rank: int = Field(ge=1, description="1: the winner")
    votes: Count = Field(description="candidates that give its answer; 0 without an answer")
    index: Count = Field(description="its place among those asked for; sampled with seed + index")
    answer: str | None = Field(description="null: it gives none")
    key: str | None = Field(description="equal for equal answers, however they are spelled")
    response: str
    score: float = Field(description="mean log-probability of its tokens, nats per token")
    weight: Share = Field(description="exp(score)")
    tokens: Count
    finish_reason: FinishReason


class Sampling(_Part):
    asked: int = Field(ge=1, description="candidates asked for")
    sampled: int = Field(ge=1, description="candidates finished")
    stopped: Stopped = Field(
        description="complete: all were sampled; certain: nothing could change the winner; confident: "
        "stop_confidence was reached; deadline: the time was up"
    )
    tokens_saved: Count = Field(description="of candidates never begun, by the mean length of the others")


class Timings(_Part):
    queued_s: Seconds
    sampling_s: Seconds
    total_s: Seconds


class Usage(_Part):
    """Tokens, those of candidates that did not win included."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count


class _Verdict(_Part):
    """How an answer came about."""

    version: Version
    strategy: Strategy
    answer: str | None = Field(description="the winner's extracted answer; null: it gives none")
    confidence: Share = Field(description="share of the votes, or of the weights, that the answer holds")
    agreement: Share = Field(description="votes of the answer / candidates sampled")
    explanation: str
    seed: Count
    sampling: Sampling
    timings: Timings


class ReasonAnswer(_Verdict):
    """The answer to a question."""

    id: str
    object: Literal["reason"]
    created: int
    model: str
    response: str = Field(description="text of the winning candidate")
    candidates: list[Candidate] = Field(description="best first")
    usage: Usage


class Verdict(_Verdict):
    candidates: list[Candidate] = Field([], description="with include_candidates")
    ignored: list[str] = Field([], description="fields of the request that do nothing here")


class Verdicts(_Part):
    """Of several prompts."""

    prompts: list[Verdict]
    ignored: list[str] = []


class _Completed(_Part):
    id: str
    created: int
    model: str
    system_fingerprint: str = Field("", description="names the policy version of a model that is of a run")
    usage: Usage
    aft_ray: Verdict | Verdicts


class _Choice(_Part):
    index: Count
    logprobs: None
    finish_reason: FinishReason


class AssistantMessage(_Part):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Choice):
    message: AssistantMessage


class TextChoice(_Choice):
    text: str


class ChatCompletion(_Completed):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextCompletion(_Completed):
    object: Literal["text_completion"]
    choices: list[TextChoice]


class TaskCard(_Part):
    examples: list[str] = Field(description="questions to try; may be empty")


class Limits(_Part):
    """What a request may ask for."""

    n: int
    max_tokens: int
    question_chars: int
    deadline_s: float


class ModelCard(_Part):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    version: Version
    strategies: list[Strategy]
    tasks: dict[str, TaskCard]
    defaults: AnsweringConfig
    limits: Limits


class ModelList(_Part):
    object: Literal["list"]
    data: list[ModelCard]


class Health(_Part):
    status: Literal["ok"]


class Ready(_Part):
    status: Literal["ready"]
    version: Version


_RETRY_AFTER = {"Retry-After": {"description": "seconds", "schema": {"type": "integer", "minimum": 1}}}
_MISTAKES: dict[int, dict[str, Any]] = {
    400: {"description": "the request asks for something that cannot be done"},
    401: {
        "description": "no API key, or a wrong one",
        "headers": {"WWW-Authenticate": {"schema": {"type": "string"}}},
    },
    404: {"description": "no such model"},
    413: {"description": "the body is too long"},
    429: {"description": "too many questions are waiting", "headers": _RETRY_AFTER},
    500: {"description": "a fault of the service; its log has it under the id in the message"},
    503: {"description": "no engine answers", "headers": _RETRY_AFTER},
    504: {"description": "the deadline passed"},
}


def _event(names: list[str], data: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "event": {"type": "string", "enum": names},
            "data": {"type": "string", "contentMediaType": "application/json", "description": data},
        },
        "required": ["data"],
    }


# An event of a stream, which without a name of its own is a message.
EVENTS = _event(
    ["start", "candidate", "result", "error"],
    "of start: what is asked; of each candidate: the same as in the answer, without rank and votes; of result: the "
    "whole answer; of error, instead of it: the body of the error",
)
CHUNKS = _event(
    ["message"],
    "OpenAI's chunk, or [DONE]; the last chunk of the first choice says in `aft_ray` how the answer came about",
)


def documented(
    model: type[BaseModel], *mistakes: int, stream: dict[str, Any] | None = None
) -> dict[int | str, dict[str, Any]]:
    """The responses of an operation: what is wanted, its events where it can stream, and what may come instead."""
    wanted: dict[str, Any] = {"model": model}
    if stream is not None:
        wanted["content"] = {"text/event-stream": {"itemSchema": stream}}
    # Without a 4XX FastAPI would document its own 422, which never comes.
    other = {"model": Error, "description": "any other mistake in the request"}
    return {200: wanted, **{status: {"model": Error, **_MISTAKES[status]} for status in mistakes}, "4XX": other}
