"""The answer to what never became an exchange: a malformed or oversized head, a connection too many.

It does not know sockets or turns: the connection says when it is written.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlxd.errors import HTTPStatusError
from mlxd.request_ids import sane_request_id
from mlxd.server.context import ServerContext
from mlxd.server.exchange import log_access
from mlxd.server.request import Address, RequestHead
from mlxd.server.responses import error_response

MAX_LOGGED_PATH = 256


@dataclass(frozen=True, slots=True)
class Refusal:
    """`head` is as much as had come of the request; None where nothing had."""

    error: HTTPStatusError
    client: Address | None
    head: RequestHead | None

    def answer(self, context: ServerContext) -> bytes:
        """The whole response, which is then logged."""
        error, head = self.error, self.head
        path = head.path if head is not None else ""
        asked = head.headers if head is not None else []
        request_id = sane_request_id(asked) or context.request_id_factory()
        status, description, headers = context.describe_error(error, path, request_id, asked)
        if context.access_log is not None:
            fields = {
                "client": f"{self.client[0]}:{self.client[1]}" if self.client else "-",
                "method": (head.method.decode("ascii") if head is not None else "") or "-",
                "path": path[:MAX_LOGGED_PATH] or "-",
                "status": status,
                "bytes": 0,
                "duration_ms": 0.0,
                "request_id": request_id,
                "error": error.code or error.type,
            }
            log_access(context.access_log, fields)
        return error_response(
            status,
            description,
            headers,
            request_id=request_id,
            date_line=context.date_line(),
            without_body=head is not None and head.method == b"HEAD",
        )
