"""The routes: HTTP in, HTTP out.

Invariant: every answer that is not the wanted one is OpenAI's error body; nothing of this program's inside reaches a
client.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from importlib import resources
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from ray.exceptions import TaskCancelledError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException

from aft_ray import __version__
from aft_ray.config.serve import STRATEGIES
from aft_ray.serving.api.admission import BodyLimit
from aft_ray.serving.api.requests import ChatRequest, CompletionRequest, ReasonRequest, Refusal
from aft_ray.serving.api.responses import (
    Answer,
    Json,
    OpenAiKind,
    candidate_row,
    event,
    last_chunk,
    openai_body,
    openai_chunks,
    openai_extras,
    reason_body,
    text_chunk,
    usage_chunk,
)
from aft_ray.serving.api.schemas import (
    CHUNKS,
    EVENTS,
    ChatCompletion,
    Health,
    ModelCard,
    ModelList,
    Ready,
    ReasonAnswer,
    TextCompletion,
    documented,
)
from aft_ray.serving.api.service import Service
from aft_ray.serving.telemetry import Record

logger = logging.getLogger("ray.serve")
# Seconds of silence in a stream before a comment keeps it open.
_ALIVE_S = 10.0
_PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'none'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
# What may come instead of an answer to a question.
_ASKED = (400, 401, 404, 413, 429, 500, 503, 504)


# For the OpenAPI document; the key is checked before, by `_Envelope`.
_scheme = HTTPBearer(auto_error=False, description="needed unless the service is open")


async def _record(request: Request, _: Annotated[Any, Depends(_scheme)]) -> Record:
    found: Record = request.state.record
    return found


Recorded = Annotated[Record, Depends(_record)]


def build_http(service: Service) -> FastAPI:
    """The ASGI application of a reasoner."""
    app = FastAPIOffline(
        title="aft_ray",
        summary="A reasoner that samples several answers and returns the one its own aligned score ranks best.",
        version=__version__,
        redoc_url=None,
    )
    _errors(app)
    _public(app, service)
    _answers(app, service)
    # The last added sees a request first.
    app.add_middleware(BodyLimit, limit_bytes=service.config.limits.body_kib << 10)
    app.add_middleware(_Envelope, service=service)
    if service.config.access.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.config.access.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return app


def _answers(app: FastAPI, service: Service) -> None:
    @app.post("/v1/reason", responses=documented(ReasonAnswer, *_ASKED, stream=EVENTS), tags=["reason"])
    async def reason(request: ReasonRequest, record: Recorded) -> Response:
        """Answer a question: candidates, their scores and votes, the winner.

        With `stream` the answer comes as events: `start`, a `candidate` each, `result` (or `error`).
        """
        ask = service.reason_ask(request, record)
        if not request.stream:
            return JSONResponse(reason_body(await service.answer(ask, record)))
        opening = service.opening(record)
        start = {
            "id": opening.id,
            "model": opening.model,
            "strategy": ask.strategy,
            "n": ask.n,
            "seed": ask.seed,
            "task": ask.task.name,
        }

        async def events(queued_s: float) -> AsyncGenerator[bytes, None]:
            yield event(start, "start")
            async with contextlib.aclosing(service.candidates(ask, queued_s, record, _ALIVE_S)) as parts:
                async for part in parts:
                    if part is None:
                        yield b": still sampling\n\n"
                    elif isinstance(part, Answer):
                        yield event(reason_body(part), "result")
                    else:
                        yield event(candidate_row(part), "candidate")

        return await _stream(service, record, events, "error")

    @app.post("/v1/chat/completions", responses=documented(ChatCompletion, *_ASKED, stream=CHUNKS), tags=["openai"])
    async def chat(request: ChatRequest, record: Recorded) -> Response:
        """OpenAI's chat completion: the content is the winning response, `aft_ray` says how it won."""
        asks = [service.chat_ask(request, record)]
        return await _openai("chat.completion", request, asks, record)

    @app.post("/v1/completions", responses=documented(TextCompletion, *_ASKED, stream=CHUNKS), tags=["openai"])
    async def completions(request: CompletionRequest, record: Recorded) -> Response:
        """OpenAI's completion: the prompt goes to the model as it is."""
        return await _openai("text_completion", request, service.completion_asks(request, record), record)

    async def _openai(
        kind: OpenAiKind, request: ChatRequest | CompletionRequest, asks: list[Any], record: Record
    ) -> Response:
        choices = request.choices

        def extras(answers: list[Answer]) -> Json:
            return openai_extras(answers, request.include_candidates, request.ignored)

        if not request.stream:
            answers = await service.answer_all(asks, record)
            return JSONResponse(openai_body(kind, answers, choices, extras(answers)))
        if len(asks) > 1:
            raise Refusal(400, "a stream answers one prompt; send one request for each", param="prompt")
        (ask,) = asks
        opening = service.opening(record)
        with_usage = bool(request.stream_options and request.stream_options.include_usage)

        async def greedy(queued_s: float) -> AsyncGenerator[bytes, None]:
            first = True
            async with contextlib.aclosing(service.spoken(ask, queued_s, record)) as parts:
                async for part in parts:
                    if isinstance(part, str):
                        yield event(text_chunk(kind, opening, 0, part, first))
                        first = False
                        continue
                    if first:
                        yield event(text_chunk(kind, opening, 0, "", first))
                    yield event(last_chunk(kind, part, 0, part.reasoned.winner.finish_reason, extras([part])))
                    if with_usage:
                        yield event(usage_chunk(kind, part))
            yield event("[DONE]")

        async def ranked(queued_s: float) -> AsyncGenerator[bytes, None]:
            yield b": sampling\n\n"
            async with contextlib.aclosing(service.candidates(ask, queued_s, record, _ALIVE_S)) as parts:
                async for part in parts:
                    if not isinstance(part, Answer):
                        yield b": still sampling\n\n"
                        continue
                    for chunk in openai_chunks(kind, part, choices, extras([part])):
                        yield event(chunk)
                    if with_usage:
                        yield event(usage_chunk(kind, part))
            yield event("[DONE]")

        return await _stream(service, record, greedy if ask.strategy == "greedy" else ranked, None)

    @app.get("/v1/models", responses=documented(ModelList, 401), tags=["openai"])
    async def models(record: Recorded) -> Response:
        """The served model: its version, tasks, defaults and limits."""
        return JSONResponse({"object": "list", "data": [await _model(service)]})

    @app.get("/v1/models/{name:path}", responses=documented(ModelCard, 401, 404), tags=["openai"])
    async def model(name: str, record: Recorded) -> Response:
        """The served model by its name."""
        service.check_model(name)
        return JSONResponse(await _model(service))


async def _model(service: Service) -> Json:
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


def _public(app: FastAPI, service: Service) -> None:
    @app.get("/health", responses=documented(Health), tags=["service"])
    async def health() -> Health:
        """Whether this process answers."""
        return Health(status="ok")

    @app.get("/ready", responses=documented(Ready, 503), tags=["service"])
    async def ready() -> Ready:
        """Whether an engine answers, and with which policy version."""
        return Ready(status="ready", version=await service.version())

    files = resources.files("aft_ray.serving") / "page"
    for path, (name, kind) in _PAGE.items():
        app.add_api_route(path, _file((files / name).read_bytes(), kind), include_in_schema=False)


def _file(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def file() -> Response:
        headers = {"Content-Security-Policy": _PAGE_POLICY, "Cache-Control": "no-cache"}
        return Response(content, media_type=kind, headers=headers)

    return file


# ── streams ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Held(StreamingResponse):
    """A stream that gives back what it holds at its end, also when it never began, and knows whether it was taken."""

    def __init__(self, content: AsyncIterator[bytes], held: contextlib.AsyncExitStack, record: Record) -> None:
        # Without these, proxies on the way may hold events back.
        super().__init__(
            content, media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        )
        self._held = held
        self._record = record

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        taken = False

        async def sending(message: Any) -> None:
            nonlocal taken
            await send(message)
            taken = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await super().__call__(scope, receive, sending)
        finally:
            if not taken:
                self._record.gone()
            await self._held.aclose()


async def _stream(
    service: Service,
    record: Record,
    events: Callable[[float], AsyncGenerator[bytes, None]],
    error_event: str | None,
) -> Response:
    """Admits first, so that a refusal still has its status; an error in the stream is its last event."""
    held = contextlib.AsyncExitStack()
    queued_s = await held.enter_async_context(service.admitted())

    async def whole() -> AsyncGenerator[bytes, None]:
        try:
            async with contextlib.aclosing(events(queued_s)) as parts:
                async for part in parts:
                    yield part
        except Exception as error:
            refusal = _refusal(error, record)
            record.failed(refusal)
            yield event(refusal.body, error_event)

    return _Held(whole(), held, record)


# ── around every request ─────────────────────────────────────────────────────────────────────────────────────────────


class _Envelope:
    """ASGI middleware: the key first, then the request, then its line in the log. Nothing fails past it."""

    def __init__(self, app: Any, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = Record(scope["path"], Headers(scope=scope).get("authorization"))
        scope.setdefault("state", {})["record"] = record
        started = False

        async def sending(message: Any) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                record.status = record.status or message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
            await send(message)

        async def receiving() -> Any:
            try:
                return await receive()
            except TaskCancelledError:
                # How Serve, at times, says that the client went away.
                return {"type": "http.disconnect"}

        try:
            if record.counted:
                self._service.keys.check(record.authorization)
            await self._app(scope, receiving, sending)
            if not started:
                record.gone()
        except asyncio.CancelledError:
            record.gone()
            raise
        except Exception as error:
            refusal = _refusal(error, record)
            record.failed(refusal)
            if not started:
                await JSONResponse(refusal.body, refusal.status, refusal.headers)(scope, receive, sending)
        finally:
            if record.counted:
                self._service.telemetry.finished(record)


def _errors(app: FastAPI) -> None:
    @app.exception_handler(Refusal)
    @app.exception_handler(HTTPException)
    @app.exception_handler(RequestValidationError)
    async def refuse(request: Request, error: Exception) -> Response:
        record = request.state.record
        refusal = _refusal(error, record)
        record.failed(refusal)
        # Allow, which comes with a 405.
        more = getattr(error, "headers", None) or {}
        return JSONResponse(refusal.body, refusal.status, more | refusal.headers)


def _refusal(error: Exception, record: Record) -> Refusal:
    """Any exception as what a client is told of it."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, RequestValidationError):
        return _invalid(error)
    if isinstance(error, HTTPException):
        if error.status_code == 400:
            return Refusal(400, "the body cannot be read as JSON: it is no UTF-8, or nested or long beyond measure")
        kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
        return Refusal(error.status_code, f"{error.detail}".lower(), kind)  # type: ignore[arg-type]
    logger.error(f"request {record.id} failed", exc_info=error)
    return Refusal(500, f"something went wrong inside the service; its log has it as {record.id}", "server_error")


def _invalid(error: RequestValidationError) -> Refusal:
    """The first thing wrong with a body, as a sentence that names the field."""
    errors = error.errors()
    path, first = _path(errors[0], error.body), errors[0]
    # A field of several kinds has an error for each; the one that came furthest says most.
    for other in errors[1:]:
        if len(found := _path(other, error.body)) > len(path) and found[: len(path)] == path:
            path, first = found, other
    if first["type"] == "json_invalid":
        return Refusal(400, "the body is not valid JSON")
    if not path:
        if "param" in first.get("ctx", {}):
            return Refusal(400, first["msg"], param=first["ctx"]["param"])
        return Refusal(400, "the body must be a JSON object, sent with Content-Type: application/json")
    name = ".".join(path)
    if first["type"] == "missing":
        return Refusal(400, f"{name} is missing", param=name)
    if first["type"] == "extra_forbidden":
        return Refusal(400, f"{name} is not a field of this request; /docs lists them", param=name)
    message = first["msg"].removeprefix("Value error, ")
    return Refusal(400, f"{name}: {message[0].lower()}{message[1:]}", param=name)


def _path(error: Json, body: Any) -> list[str]:
    """Where in the body an error is: its location, without pydantic's names of the kinds that a field may be of."""
    _, *location = error["loc"]
    path: list[str] = []
    for part in location:
        if isinstance(body, dict) and (part in body or error["type"] == "missing"):
            body = body.get(part)
        elif isinstance(body, list) and isinstance(part, int):
            body = body[part]
        else:
            continue
        path.append(str(part))
    return path
