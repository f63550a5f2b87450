"""Every error mlxd raises on purpose, each with the HTTP status and code it becomes.

It does not know the dialects: api/openai and api/anthropic put these into their own bodies.

    MlxdError
    ├── ConfigError                 the operator's mistake; the server exits with 2
    ├── RequestError                the client's mistake (4xx)
    │   ├── InvalidRequestError     400
    │   │   └── ContextLengthExceeded
    │   ├── AuthenticationError     401
    │   ├── PermissionDeniedError   403
    │   ├── NotFoundError           404
    │   │   └── ModelNotFoundError
    │   ├── MethodNotAllowedError   405
    │   ├── BodyTimeoutError        408
    │   ├── PayloadTooLargeError    413
    │   ├── UnsupportedMediaTypeError 415
    │   ├── RateLimitError          429
    │   └── ClientClosedRequest     499  (sent only to who cancelled by id; else logs and metrics)
    └── ServerError                 ours (5xx)
        ├── InternalError           500
        │   └── WorkerError         the worker died or refused
        │       └── SuspectError    maybe because of this request
        ├── OverloadedError         503
        ├── NotReadyError           503
        ├── McpNotConfigured        503
        ├── McpError                502
        └── GenerationTimeout       504
"""

from __future__ import annotations

from math import ceil


class MlxdError(Exception):
    """Base of all errors raised on purpose. `str(error)` is safe to show to a client."""


class ConfigError(MlxdError):
    """The configuration cannot be used. The message names the key, what was read, what is allowed."""


class HTTPStatusError(MlxdError):
    """An error that has an HTTP answer.

    `status` is the HTTP status, `type` the OpenAI error type, `code` the OpenAI error code (or None),
    `param` the request field at fault (or None), `headers` extra response headers. `details_code` is the
    `details.error_code` of Anthropic's errors (or None), by which its SDKs know what to do.
    """

    status = 500
    type = "api_error"
    code: str | None = None
    details_code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.headers = headers or {}
        if code is not None:
            self.code = code


class RequestError(HTTPStatusError):
    """The client's mistake."""

    status = 400
    type = "invalid_request_error"


class InvalidRequestError(RequestError):
    """A field is missing, of the wrong type, out of range, or cannot be honoured."""


class ContextLengthExceeded(InvalidRequestError):
    """Prompt plus asked tokens do not fit the model's context."""

    code = "context_length_exceeded"


class ThreadsUnsupported(InvalidRequestError):
    """A client leaves its conversation to the server, which keeps none; Anthropic's SDKs then send it all."""

    details_code = "thread_unsupported_request"


class AuthenticationError(RequestError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class PermissionDeniedError(RequestError):
    """The key is good, but not for this."""

    status = 403
    type = "permission_error"
    code = "permission_denied"


class NotFoundError(RequestError):
    status = 404
    type = "not_found_error"
    code = "not_found"


class ModelNotFoundError(NotFoundError):
    code = "model_not_found"


class MethodNotAllowedError(RequestError):
    """`allow` lists the methods that the path takes."""

    status = 405
    code = "method_not_allowed"

    def __init__(self, message: str, allow: str) -> None:
        super().__init__(message, headers={"allow": allow})


class BodyTimeoutError(RequestError):
    status = 408
    code = "request_timeout"


class PayloadTooLargeError(RequestError):
    status = 413
    type = "request_too_large"
    code = "request_too_large"


class UnsupportedMediaTypeError(RequestError):
    status = 415
    code = "unsupported_media_type"


class RateLimitError(RequestError):
    """`retry_after` in seconds; `limit` is what was reached: requests, tokens or quota."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(
        self,
        message: str,
        retry_after: float,
        *,
        limit: str = "requests",
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message, code=code, headers=_retry_after(retry_after) | (headers or {}))
        self.limit = limit


class ClientClosedRequest(RequestError):
    """The client left before the answer was complete."""

    status = 499
    code = "client_closed_request"


class ServerError(HTTPStatusError):
    """Our fault, or our limit."""


class InternalError(ServerError):
    """A bug. The message carries no internals."""

    code = "internal_error"


class WorkerError(InternalError):
    """The worker process died, or could not run this request."""

    code = "worker_error"


class SuspectError(WorkerError):
    """The worker process died while it computed this request, and maybe because of it."""


class OverloadedError(ServerError):
    """The queue is full. `retry_after` in seconds."""

    status = 503
    type = "overloaded_error"
    code = "overloaded"

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message, headers=_retry_after(retry_after))


class NotReadyError(ServerError):
    """The model is loading, the worker is restarting, or the server is shutting down."""

    status = 503
    type = "overloaded_error"
    code = "not_ready"

    def __init__(self, message: str, retry_after: float = 2) -> None:
        super().__init__(message, headers=_retry_after(retry_after))


class McpError(ServerError):
    """An MCP server could not run a tool: not connected, died, refused, or too slow."""

    status = 502
    code = "mcp_error"


class McpNotConfigured(ServerError):
    """There is no MCP configuration, so there are no tools to list or run."""

    status = 503
    code = "mcp_not_configured"


class GenerationTimeout(ServerError):
    status = 504
    type = "timeout_error"
    code = "timeout"


def _retry_after(seconds: float) -> dict[str, str]:
    """Whole seconds, rounded up: who comes back earlier is refused again."""
    return {"retry-after": str(max(1, ceil(seconds)))}
