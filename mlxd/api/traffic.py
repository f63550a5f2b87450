"""What was asked of this server and how it ended: the counts behind /metrics.

It does not know Prometheus or the engine.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from mlxd.api.http import HTTPRequest
from mlxd.errors import ClientClosedRequest, NotReadyError

OTHER_ENDPOINT = "other"
"""Paths that do not exist: their names are the clients' to choose, and would have no end."""

ABORT_REASONS = {
    "client_closed_request": "disconnect",
    "request_cancelled": "cancel",
    "timeout": "timeout",
    "not_ready": "shutdown",
    "worker_error": "worker",
    "invalid_request_error": "request",
}
"""By the code of the error that an answer ended with, or its type; all others are `error`."""


@dataclass(slots=True)
class Traffic:
    """Totals since start, of HTTP requests; n choices are one of them."""

    num_in_flight: int = 0
    requests: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """(endpoint, status, finish reason) -> number. The reason is empty where nothing was generated"""
    aborts: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(ABORT_REASONS.values(), 0)))
    """generations that ended before they were done, by reason"""
    rate_limited: Counter[str] = field(
        default_factory=lambda: Counter({"requests": 0, "tokens": 0, "quota": 0})
    )
    """requests refused, by the limit that they reached"""
    key_tokens: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(key name, prompt or completion) -> tokens"""

    def count(self, request: HTTPRequest) -> None:
        """`request` is over, and its last byte written, or nobody is there to read it."""
        access = request.access
        status = request.status or NotReadyError.status  # without one it was cut off by the server's shutdown
        if request.refused:
            status = access["status"]
        elif request.client_gone and not request.response_complete:
            status = ClientClosedRequest.status
        key = (request.route or OTHER_ENDPOINT, str(status), access.get("finish_reason", ""))
        self.requests[key] += 1
        if "prompt_tokens" not in access:
            return
        error = access.get("error")
        if error is not None:
            self.aborts[ABORT_REASONS.get(error, "error")] += 1
        if request.caller.name is not None:
            self.key_tokens[request.caller.name, "prompt"] += access["prompt_tokens"]
            self.key_tokens[request.caller.name, "completion"] += access["completion_tokens"]
