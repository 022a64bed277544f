"""The HTTP routes of a reasoner: our own API, OpenAI's API, health checks and the web page.

Invariant: every response other than the requested one has OpenAI's error body.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from importlib import resources
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from aft_ray import __version__
from aft_ray.config.serve import STRATEGIES
from aft_ray.serving.api.errors import ApiError, api_error
from aft_ray.serving.api.middleware import BodyLimitMiddleware, RequestMiddleware
from aft_ray.serving.api.requests import ChatRequest, CompletionRequest, ReasonRequest
from aft_ray.serving.api.responses import (
    Answer,
    Json,
    OpenAiKind,
    candidate_row,
    last_chunk,
    openai_body,
    openai_chunks,
    openai_extras,
    reason_body,
    text_chunk,
    usage_chunk,
)
from aft_ray.serving.api.schemas import (
    CHUNK_SCHEMA,
    EVENT_SCHEMA,
    ChatCompletion,
    Health,
    ModelCard,
    ModelList,
    Ready,
    ReasonAnswer,
    TextCompletion,
    openapi_responses,
)
from aft_ray.serving.api.service import Service
from aft_ray.serving.api.streaming import event, stream_response
from aft_ray.serving.api.telemetry import RequestRecord
from aft_ray.serving.reasoning import ReasoningRequest

# Seconds without an event after which a comment is sent, so that proxies do not close the connection.
_KEEP_ALIVE_S = 10.0
_PAGE_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
_PAGE_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'none'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
# The error statuses of the routes that answer questions.
_ERROR_STATUSES = (400, 401, 404, 413, 429, 500, 503, 504)


# Only documents in the OpenAPI document that a key is needed; RequestMiddleware checks the key.
_bearer_scheme = HTTPBearer(auto_error=False, description="needed unless the service is open")


async def _request_record(request: Request, _: Annotated[Any, Depends(_bearer_scheme)]) -> RequestRecord:
    record: RequestRecord = request.state.record
    return record


Recorded = Annotated[RequestRecord, Depends(_request_record)]


def build_http_app(service: Service) -> FastAPI:
    """Returns the ASGI application of a reasoner."""
    app = FastAPIOffline(
        title="aft_ray",
        summary="A reasoner that samples several answers and returns the one its own aligned score ranks best.",
        version=__version__,
        redoc_url=None,
    )
    _add_error_handlers(app)
    _add_public_routes(app, service)
    _add_answer_routes(app, service)
    # A request passes the middleware in reverse order: what is added last sees it first.
    app.add_middleware(BodyLimitMiddleware, limit_bytes=service.config.limits.body_kib << 10)
    app.add_middleware(RequestMiddleware, keys=service.api_keys, telemetry=service.telemetry)
    if service.config.access.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.config.access.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return app


def _add_answer_routes(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/reason", responses=openapi_responses(ReasonAnswer, *_ERROR_STATUSES, stream=EVENT_SCHEMA), tags=["reason"]
    )
    async def reason(request: ReasonRequest, record: Recorded) -> Response:
        """Answer a question; the response has the winner and all candidates with their scores and votes.

        With `stream` the response is a stream of events: `start`, one `candidate` for each candidate, then `result`,
        or `error` in its place.
        """
        prepared = service.prepare_reason(request, record)
        if not request.stream:
            return JSONResponse(reason_body(await service.answer(prepared, record)))
        header = service.answer_header(record)
        start = {
            "id": header.id,
            "model": header.model,
            "strategy": prepared.strategy,
            "n": prepared.n,
            "seed": prepared.seed,
            "task": prepared.task.name,
        }

        async def events(queued_s: float) -> AsyncGenerator[bytes, None]:
            yield event(start, "start")
            parts = service.stream_candidates(prepared, queued_s, record, _KEEP_ALIVE_S)
            async with contextlib.aclosing(parts):
                async for part in parts:
                    if part is None:
                        yield b": still sampling\n\n"
                    elif isinstance(part, Answer):
                        yield event(reason_body(part), "result")
                    else:
                        yield event(candidate_row(part), "candidate")

        return await stream_response(service, record, events, "error")

    @app.post(
        "/v1/chat/completions",
        responses=openapi_responses(ChatCompletion, *_ERROR_STATUSES, stream=CHUNK_SCHEMA),
        tags=["openai"],
    )
    async def chat(request: ChatRequest, record: Recorded) -> Response:
        """OpenAI's chat completion: the content is the winning response; `aft_ray` has the details of the ranking."""
        return await _openai_response(
            service, "chat.completion", request, [service.prepare_chat(request, record)], record
        )

    @app.post(
        "/v1/completions",
        responses=openapi_responses(TextCompletion, *_ERROR_STATUSES, stream=CHUNK_SCHEMA),
        tags=["openai"],
    )
    async def completions(request: CompletionRequest, record: Recorded) -> Response:
        """OpenAI's completion: the prompt is passed to the model unchanged."""
        return await _openai_response(
            service, "text_completion", request, service.prepare_completions(request, record), record
        )

    @app.get("/v1/models", responses=openapi_responses(ModelList, 401), tags=["openai"])
    async def models(record: Recorded) -> Response:
        """The served model: its version, tasks, defaults and limits."""
        return JSONResponse({"object": "list", "data": [await _model_card(service)]})

    @app.get("/v1/models/{name:path}", responses=openapi_responses(ModelCard, 401, 404), tags=["openai"])
    async def model(name: str, record: Recorded) -> Response:
        """The served model by its name."""
        service.check_model(name)
        return JSONResponse(await _model_card(service))


async def _openai_response(
    service: Service,
    kind: OpenAiKind,
    request: ChatRequest | CompletionRequest,
    prepared: list[ReasoningRequest],
    record: RequestRecord,
) -> Response:
    """Answers the questions of a request to one of OpenAI's routes, whole or as a stream."""

    def extras(answers: list[Answer]) -> Json:
        return openai_extras(answers, request.include_candidates, request.ignored)

    if not request.stream:
        answers = await service.answer_all(prepared, record)
        return JSONResponse(openai_body(kind, answers, request.choices, extras(answers)))
    if len(prepared) > 1:
        raise ApiError(400, "a stream answers one prompt; send one request for each prompt", param="prompt")
    (question,) = prepared
    header = service.answer_header(record)
    with_usage = bool(request.stream_options and request.stream_options.include_usage)

    async def greedy_events(queued_s: float) -> AsyncGenerator[bytes, None]:
        first = True
        parts = service.stream_text(question, queued_s, record)
        async with contextlib.aclosing(parts):
            async for part in parts:
                if isinstance(part, str):
                    yield event(text_chunk(kind, header, 0, part, first))
                    first = False
                    continue
                if first:
                    yield event(text_chunk(kind, header, 0, "", first))
                yield event(last_chunk(kind, part, 0, part.result.winner.finish_reason, extras([part])))
                if with_usage:
                    yield event(usage_chunk(kind, part))
        yield event("[DONE]")

    async def ranked_events(queued_s: float) -> AsyncGenerator[bytes, None]:
        # The text is known only when the winner is: comments keep the connection open until then.
        yield b": sampling\n\n"
        parts = service.stream_candidates(question, queued_s, record, _KEEP_ALIVE_S)
        async with contextlib.aclosing(parts):
            async for part in parts:
                if not isinstance(part, Answer):
                    yield b": still sampling\n\n"
                    continue
                for chunk in openai_chunks(kind, part, request.choices, extras([part])):
                    yield event(chunk)
                if with_usage:
                    yield event(usage_chunk(kind, part))
        yield event("[DONE]")

    events = greedy_events if question.strategy == "greedy" else ranked_events
    return await stream_response(service, record, events, None)


async def _model_card(service: Service) -> Json:
    config = service.config
    return {
        "id": service.served.name,
        "object": "model",
        "created": 0,
        "owned_by": "aft_ray",
        "version": await service.last_version(),
        "strategies": list(STRATEGIES),
        "tasks": {name: {"examples": questions} for name, questions in service.examples.items()},
        "defaults": config.answering.model_dump(),
        "limits": config.limits.model_dump(include={"n", "max_tokens", "question_chars", "deadline_s"}),
    }


def _add_public_routes(app: FastAPI, service: Service) -> None:
    """Adds the routes that need no key."""

    @app.get("/health", responses=openapi_responses(Health), tags=["service"])
    async def health() -> Health:
        """Whether this process answers."""
        return Health(status="ok")

    @app.get("/ready", responses=openapi_responses(Ready, 503), tags=["service"])
    async def ready() -> Ready:
        """Whether an engine answers, and which policy version it holds."""
        return Ready(status="ready", version=await service.version())

    directory = resources.files("aft_ray.serving") / "page"
    for path, (name, media_type) in _PAGE_FILES.items():
        app.add_api_route(path, _static_file((directory / name).read_bytes(), media_type), include_in_schema=False)


def _static_file(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def file() -> Response:
        headers = {"Content-Security-Policy": _PAGE_SECURITY_POLICY, "Cache-Control": "no-cache"}
        return Response(content, media_type=media_type, headers=headers)

    return file


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    @app.exception_handler(HTTPException)
    @app.exception_handler(RequestValidationError)
    async def respond(request: Request, exception: Exception) -> Response:
        record = request.state.record
        error = api_error(exception, record.id)
        record.set_error(error)
        # A 405 comes with the header Allow, which is kept.
        headers = getattr(exception, "headers", None) or {}
        return JSONResponse(error.body, error.status, headers | error.headers)
