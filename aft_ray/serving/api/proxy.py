"""Middleware of Serve's HTTP proxy, which loads it if `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` names `middlewares`.

Invariant: a request whose reasoner process dies gets a 503 that says to try again. Without this middleware, the proxy
would answer it with an empty 500.
"""

from __future__ import annotations

from typing import Any

from starlette.middleware import Middleware
from starlette.responses import JSONResponse

from aft_ray.serving.api.errors import ApiError

CALLBACK_IMPORT_PATH = "aft_ray.serving.api.proxy:middlewares"


def middlewares() -> list[Middleware]:
    """Returns the middleware that the proxy puts around every request."""
    return [Middleware(_LostReasonerMiddleware)]


class _LostReasonerMiddleware:
    """ASGI middleware that answers with a 503 when the application returned without a response."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        started = scope["type"] != "http"

        async def send_and_note_start(message: Any) -> None:
            nonlocal started
            started = True
            await send(message)

        await self._app(scope, receive, send_and_note_start)
        if not started:
            error = ApiError(
                503,
                "the process that was answering this request ended; try again",
                "server_error",
                None,
                "reasoner_lost",
                1.0,
            )
            await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)
