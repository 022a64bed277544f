"""The bound on the size of a request's body."""

import os

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from aft_ray.serving.api.errors import ApiError
from aft_ray.serving.api.middleware import BodyLimitMiddleware


async def echo(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_over_the_limit_is_refused_whether_or_not_it_says_so(declared):
    client = TestClient(BodyLimitMiddleware(Starlette(routes=[Route("/", echo, methods=["POST"])]), limit_bytes=1000))

    def send(size):
        body = os.urandom(size)
        return client.post("/", content=body if declared else iter([body[:10], body[10:]]))

    assert send(1000).text == "1000"
    with pytest.raises(ApiError) as refused:
        send(1001)
    assert refused.value.status == 413
    assert refused.value.body["error"]["type"] == "invalid_request_error"
