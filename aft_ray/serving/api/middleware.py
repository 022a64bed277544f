"""ASGI middleware around every request: its API key, its size, its errors and its line in the access log.

Invariant: a request is neither read nor answered before its key has been checked, and its body is held in memory only
up to `limits.body_kib`.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi.responses import JSONResponse
from ray.exceptions import TaskCancelledError
from starlette.datastructures import Headers, MutableHeaders

from aft_ray.serving.api.api_keys import ApiKeys
from aft_ray.serving.api.errors import ApiError, api_error
from aft_ray.serving.api.telemetry import RequestRecord, Telemetry


class RequestMiddleware:
    """Gives each request its RequestRecord as `request.state.record`, checks its key, and logs it when it has ended.

    Invariant: no exception leaves this middleware except cancellation.
    """

    def __init__(self, app: Any, keys: ApiKeys, telemetry: Telemetry) -> None:
        self._app = app
        self._keys = keys
        self._telemetry = telemetry

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(scope["path"], Headers(scope=scope).get("authorization"))
        scope.setdefault("state", {})["record"] = record
        started = False

        async def send_with_headers(message: Any) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                record.status = record.status or message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
            await send(message)

        async def receive_or_disconnect() -> Any:
            try:
                return await receive()
            except TaskCancelledError:
                # Serve sometimes reports in this way that the client closed the connection.
                return {"type": "http.disconnect"}

        try:
            if record.logged:
                self._keys.check(record.authorization)
            await self._app(scope, receive_or_disconnect, send_with_headers)
            if not started:
                record.set_client_gone()
        except asyncio.CancelledError:
            record.set_client_gone()
            raise
        except Exception as exception:
            error = api_error(exception, record.id)
            record.set_error(error)
            if not started:
                await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)
        finally:
            if record.logged:
                self._telemetry.finish_request(record)


class BodyLimitMiddleware:
    """Reads the whole body before the application does, and raises ApiError (413) if it is larger than the limit."""

    def __init__(self, app: Any, limit_bytes: int) -> None:
        self._app = app
        self._limit = limit_bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._limit:
            raise self._too_large()
        chunks: list[bytes] = []
        length, more = 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return  # the client closed the connection
            chunks.append(message.get("body", b""))
            length += len(chunks[-1])
            more = message.get("more_body", False)
            if length > self._limit:
                raise self._too_large()
        unread: list[Any] = [{"type": "http.request", "body": b"".join(chunks), "more_body": False}]

        async def replay() -> Any:
            return unread.pop() if unread else await receive()

        await self._app(scope, replay, send)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request body is longer than {self._limit >> 10} KiB, limits.body_kib")
