"""What Serve's HTTP proxy adds when `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` names `middlewares`.

Invariant: a request whose reasoner died under it ends with a 503 that says to try again. Left to itself, the proxy
would end it with an empty 500, as if the request were at fault.
"""

from __future__ import annotations

from typing import Any

from starlette.middleware import Middleware
from starlette.responses import JSONResponse

from aft_ray.serving.api.requests import Refusal

CALLBACK = "aft_ray.serving.api.proxy:middlewares"


def middlewares() -> list[Middleware]:
    """What the proxy asks for."""
    return [Middleware(_CleanEnd)]


class _CleanEnd:
    """ASGI middleware."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        started = scope["type"] != "http"

        async def sending(message: Any) -> None:
            nonlocal started
            started = True
            await send(message)

        await self._app(scope, receive, sending)
        if not started:
            refusal = Refusal(
                503, "the process that answered ended; try again", "server_error", None, "reasoner_lost", 1.0
            )
            await JSONResponse(refusal.body, refusal.status, refusal.headers)(scope, receive, send)
