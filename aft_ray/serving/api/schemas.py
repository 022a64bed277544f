"""The bodies of responses, as the OpenAPI document describes them.

Invariant: every response has exactly the fields listed here. The service does not validate its responses against these
models; the tests do.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from aft_ray.config.serve import AnsweringConfig, Strategy
from aft_ray.serving.api.errors import ErrorType
from aft_ray.serving.reasoning import StopReason

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]
Version = Annotated[
    int | None, Field(description="policy version that made all candidates; null: the model is not from a run")
]
FinishReason = Literal["stop", "length"]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(_Body):
    message: str = Field(description="one sentence")
    type: ErrorType
    param: str | None = Field(description="the field that is wrong")
    code: str | None


class Error(_Body):
    """The body of every response that is not the requested one."""

    error: ErrorDetail


class Candidate(_Body):
    """A sampled response."""

    rank: int = Field(ge=1, description="1: the winner")
    votes: Count = Field(description="candidates that give the same answer; 0 without an answer")
    index: Count = Field(
        description="its number among the requested candidates, from 0; it is sampled with seed + index"
    )
    answer: str | None = Field(description="the extracted answer; null: the response gives none")
    key: str | None = Field(
        description="canonical form of the answer: equal for equal answers, however they are spelled"
    )
    response: str
    score: float = Field(description="mean log-probability of its tokens, nats per token")
    weight: Share = Field(description="exp(score)")
    tokens: Count
    finish_reason: FinishReason


class Sampling(_Body):
    asked: int = Field(ge=1, description="candidates asked for")
    sampled: int = Field(ge=1, description="candidates finished")
    stopped: StopReason = Field(
        description="complete: all candidates were sampled; certain: no further candidate could change the winner; "
        "confident: stop_confidence was reached; deadline: the time was up"
    )
    tokens_saved: Count = Field(
        description="tokens of the candidates that were not sampled, estimated by the mean length of the others"
    )


class Timings(_Body):
    queued_s: Seconds
    sampling_s: Seconds
    total_s: Seconds


class Usage(_Body):
    """Numbers of tokens, including those of candidates that did not win."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count


class _AnswerDetails(_Body):
    """The details of an answer that both APIs give."""

    version: Version
    strategy: Strategy
    answer: str | None = Field(description="the winner's extracted answer; null: its response gives none")
    confidence: Share = Field(description="the answer's share of the votes, or of their weights")
    agreement: Share = Field(description="votes of the answer / candidates sampled")
    explanation: str
    seed: Count
    sampling: Sampling
    timings: Timings


class ReasonAnswer(_AnswerDetails):
    """The answer to a question."""

    id: str
    object: Literal["reason"]
    created: int
    model: str
    response: str = Field(description="text of the winning candidate")
    candidates: list[Candidate] = Field(description="best first")
    usage: Usage


class Verdict(_AnswerDetails):
    candidates: list[Candidate] = Field([], description="present with include_candidates")
    ignored: list[str] = Field([], description="fields of the request that have no effect")


class Verdicts(_Body):
    """The details of the answers to several prompts."""

    prompts: list[Verdict]
    ignored: list[str] = []


class _OpenAiAnswer(_Body):
    id: str
    created: int
    model: str
    system_fingerprint: str = Field("", description="names the policy version, if the model is from a run")
    usage: Usage
    aft_ray: Verdict | Verdicts


class _Choice(_Body):
    index: Count
    logprobs: None
    finish_reason: FinishReason


class AssistantMessage(_Body):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Choice):
    message: AssistantMessage


class TextChoice(_Choice):
    text: str


class ChatCompletion(_OpenAiAnswer):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextCompletion(_OpenAiAnswer):
    object: Literal["text_completion"]
    choices: list[TextChoice]


class TaskCard(_Body):
    examples: list[str] = Field(description="example questions; may be empty")


class Limits(_Body):
    """The largest values that a request may ask for."""

    n: int
    max_tokens: int
    question_chars: int
    deadline_s: float


class ModelCard(_Body):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    version: Version
    strategies: list[Strategy]
    tasks: dict[str, TaskCard]
    defaults: AnsweringConfig
    limits: Limits


class ModelList(_Body):
    object: Literal["list"]
    data: list[ModelCard]


class Health(_Body):
    status: Literal["ok"]


class Ready(_Body):
    status: Literal["ready"]
    version: Version


_RETRY_AFTER = {"Retry-After": {"description": "seconds", "schema": {"type": "integer", "minimum": 1}}}
_ERROR_RESPONSES: dict[int, dict[str, Any]] = {
    400: {"description": "the request is not valid"},
    401: {
        "description": "no API key, or a wrong one",
        "headers": {"WWW-Authenticate": {"schema": {"type": "string"}}},
    },
    404: {"description": "no such model"},
    413: {"description": "the body is too long"},
    429: {"description": "too many questions are waiting", "headers": _RETRY_AFTER},
    500: {"description": "the service failed; its log gives the cause under the id in the message"},
    503: {"description": "no engine answers", "headers": _RETRY_AFTER},
    504: {"description": "the deadline passed"},
}


def _event_schema(names: list[str], description: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "event": {"type": "string", "enum": names},
            "data": {"type": "string", "contentMediaType": "application/json", "description": description},
        },
        "required": ["data"],
    }


# An event without a name is of the type "message".
EVENT_SCHEMA = _event_schema(
    ["start", "candidate", "result", "error"],
    "start: the question's settings; candidate: one candidate as in the answer, without rank and votes; result: the "
    "whole answer; error: the error body, sent instead of the result",
)
CHUNK_SCHEMA = _event_schema(
    ["message"],
    "OpenAI's chunk, or [DONE]; the last chunk of the first choice has the details of the ranking in `aft_ray`",
)


def openapi_responses(
    model: type[BaseModel], *error_statuses: int, stream: dict[str, Any] | None = None
) -> dict[int | str, dict[str, Any]]:
    """Returns an operation's `responses`: the body, the events if it can stream, and the errors."""
    success: dict[str, Any] = {"model": model}
    if stream is not None:
        success["content"] = {"text/event-stream": {"itemSchema": stream}}
    # Without a 4XX, FastAPI would document a 422, which this service never sends.
    other = {"model": Error, "description": "any other mistake in the request"}
    responses: dict[int | str, dict[str, Any]] = {200: success}
    responses |= {status: {"model": Error, **_ERROR_RESPONSES[status]} for status in error_statuses}
    return responses | {"4XX": other}
