"""Server-sent events: how an answer is streamed to a client.

Invariant: a question keeps its slot in the queue exactly as long as its stream is open, and an error after the first
event is the stream's last event.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from fastapi.responses import StreamingResponse

from aft_ray.serving.api.errors import api_error
from aft_ray.serving.api.service import Service
from aft_ray.serving.api.telemetry import RequestRecord


def event(data: dict[str, Any] | str, name: str | None = None) -> bytes:
    """Returns a server-sent event; `data` is sent as JSON unless it is a string."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return (f"event: {name}\n" if name else "").encode() + f"data: {text}\n\n".encode()


async def stream_response(
    service: Service,
    record: RequestRecord,
    events: Callable[[float], AsyncGenerator[bytes, None]],
    error_event: str | None,
) -> StreamingResponse:
    """Returns the streamed response of a question, after waiting for the question's slot.

    Args:
        service: where the question is admitted.
        record: the request's record, in which an error or a closed connection is noted.
        events: makes the events, given the seconds that the question waited for its slot.
        error_event: name of the event that an error is sent as; None: an event without a name.

    Raises:
        ApiError: the question is not admitted. The response has the error's status then, since it has not begun.
    """
    resources = contextlib.AsyncExitStack()
    queued_s = await resources.enter_async_context(service.admit())

    async def events_or_error() -> AsyncGenerator[bytes, None]:
        try:
            async with contextlib.aclosing(events(queued_s)) as parts:
                async for part in parts:
                    yield part
        except Exception as exception:
            error = api_error(exception, record.id)
            record.set_error(error)
            yield event(error.body, error_event)

    return _EventStream(events_or_error(), resources, record)


class _EventStream(StreamingResponse):
    """A stream of events that releases its resources at its end, also if the client disconnects before it begins."""

    def __init__(
        self, content: AsyncIterator[bytes], resources: contextlib.AsyncExitStack, record: RequestRecord
    ) -> None:
        # Without these headers, a proxy between service and client may buffer events.
        super().__init__(
            content, media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        )
        self._resources = resources
        self._record = record

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        completed = False

        async def send_and_note_end(message: Any) -> None:
            nonlocal completed
            await send(message)
            completed = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await super().__call__(scope, receive, send_and_note_end)
        finally:
            if not completed:
                self._record.set_client_gone()
            await self._resources.aclose()
