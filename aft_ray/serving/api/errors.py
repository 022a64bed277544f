"""Error responses of the HTTP API: an HTTP status with OpenAI's error body, for every exception.

Invariant: a response to a client has no internal details, such as a traceback.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

logger = logging.getLogger("ray.serve")

ErrorType = Literal[
    "invalid_request_error",
    "authentication_error",
    "not_found_error",
    "rate_limit_error",
    "timeout_error",
    "server_error",
]


class ApiError(Exception):
    """An error response: an HTTP status, OpenAI's error body, and response headers.

    Args:
        status: HTTP status.
        message: one sentence.
        kind: the body's `type`.
        param: the field of the request that is wrong.
        code: a word by which programs tell errors of one status apart.
        retry_after_s: seconds after which trying again may succeed; None where it would not help.
    """

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
        """Retry-After in whole seconds if trying again helps; the authentication scheme if the status is 401."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(max(1, round(self.retry_after_s)))}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def api_error(error: Exception, request_id: str) -> ApiError:
    """Returns the error response for an exception.

    An exception that is not a mistake of the client is written to the log under the request's id.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return _validation_error(error)
    if isinstance(error, HTTPException):
        if error.status_code == 400:
            return ApiError(
                400, "the body cannot be read as JSON: it is not UTF-8, it is nested too deeply or a number is too long"
            )
        kind: ErrorType = "not_found_error" if error.status_code == 404 else "invalid_request_error"
        return ApiError(error.status_code, f"{error.detail}".lower(), kind)
    logger.error(f"request {request_id} failed", exc_info=error)
    return ApiError(500, f"the service failed; its log gives the cause under {request_id}", "server_error")


def _validation_error(error: RequestValidationError) -> ApiError:
    """Returns the first mistake in a body as a sentence that names the field."""
    errors = error.errors()
    path, first = _field_path(errors[0], error.body), errors[0]
    # A field that may be of several types has an error for each; the one deepest in the body is the most specific.
    for other in errors[1:]:
        if len(found := _field_path(other, error.body)) > len(path) and found[: len(path)] == path:
            path, first = found, other
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON")
    if not path:
        if "param" in first.get("ctx", {}):
            return ApiError(400, first["msg"], param=first["ctx"]["param"])
        return ApiError(400, "the body must be a JSON object, sent with Content-Type: application/json")
    name = ".".join(path)
    if first["type"] == "missing":
        return ApiError(400, f"{name} is missing", param=name)
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{name} is not a field of this request; /docs lists them", param=name)
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{name}: {message[0].lower()}{message[1:]}", param=name)


def _field_path(error: dict[str, Any], body: Any) -> list[str]:
    """Returns an error's location in the body, without the names that pydantic adds for the types of a union."""
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
