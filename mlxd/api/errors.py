"""Errors as bodies: OpenAI's shape and Anthropic's.

It does not know when errors happen; mlxd.errors says which status and code each one has.
"""

from __future__ import annotations

from typing import Any

from mlxd.errors import HTTPStatusError

_ANTHROPIC_PREFIX = "/v1/messages"

_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def is_anthropic_path(path: str) -> bool:
    """Whether clients of `path` expect Anthropic's errors."""
    return path == _ANTHROPIC_PREFIX or path.startswith(_ANTHROPIC_PREFIX + "/")


def openai_error(error: HTTPStatusError) -> dict[str, Any]:
    """`{"error": {message, type, param, code}}`"""
    return {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }


def anthropic_error(error: HTTPStatusError, request_id: str) -> dict[str, Any]:
    """`{"type": "error", "error": {type, message, details}, "request_id"}`; mostly there are no details."""
    default = "invalid_request_error" if error.status < 500 else "api_error"
    described = {"type": _ANTHROPIC_TYPES.get(error.status, default), "message": error.message}
    details = {} if error.details_code is None else {"details": {"error_code": error.details_code}}
    return {"type": "error", "error": {**described, **details}, "request_id": request_id}


def error_response(error: HTTPStatusError, path: str, request_id: str) -> tuple[int, dict[str, Any]]:
    """Status and body of `error` in the dialect that `path` speaks."""
    if is_anthropic_path(path):
        # Anthropic's own status for an overloaded server, which its SDK retries.
        status = 529 if error.status == 503 else error.status
        return status, anthropic_error(error, request_id)
    return error.status, openai_error(error)


def error_headers(error: HTTPStatusError) -> list[tuple[bytes, bytes]]:
    """Those that the answer to `error` carries because of it."""
    return [(name.encode(), value.encode()) for name, value in error.headers.items()]


def drop_tracebacks(error: BaseException) -> None:
    """Forget the frames that `error`, and what it came of, were raised through, once it is answered.

    The frames refer to the request and its outputs, and these to the error: all of it would be left to the
    collector.
    """
    cause: BaseException | None = error
    # Not twice the same one: exceptions of libraries can have come of each other.
    while cause is not None and cause.__traceback__ is not None:
        cause.__traceback__ = None
        cause = cause.__cause__ or cause.__context__
