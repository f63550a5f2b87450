"""Cross-origin requests: which web pages may call this server.

It does not know routes. See https://fetch.spec.whatwg.org/#http-cors-protocol.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlxd.api.http import Headers, HTTPRequest

PREFLIGHT_MAX_AGE_SECONDS = 600
EXPOSED = b", ".join(
    [
        b"x-request-id",
        b"request-id",
        b"retry-after",
        b"x-should-retry",
        *(
            f"x-ratelimit-{what}-{unit}".encode()
            for unit in ("requests", "tokens")
            for what in ("limit", "remaining", "reset")
        ),
    ]
)
"""What a page may read of an answer beside its body."""


class Cors:
    """Allows the given origins; `*` allows all. None given: no page of another origin may read an answer."""

    __slots__ = ("_any", "_origins")

    def __init__(self, origins: Sequence[str]) -> None:
        self._any = "*" in origins
        self._origins = frozenset(origin.encode() for origin in origins)

    def headers(self, origin: bytes | None) -> Headers:
        """What every answer to a request of that origin carries."""
        if self._any:
            return [
                (b"access-control-allow-origin", b"*"),
                (b"access-control-expose-headers", EXPOSED),
            ]
        if not self._origins:
            return []
        headers: Headers = [(b"vary", b"origin")]
        if origin in self._origins:
            headers += [
                (b"access-control-allow-origin", origin),
                (b"access-control-expose-headers", EXPOSED),
            ]
        return headers

    def preflight(self, request: HTTPRequest, allow: str) -> Headers:
        """What an OPTIONS answer carries beside: `allow` lists the path's methods."""
        if not self._any and request.header(b"origin") not in self._origins:
            return []
        asked = request.header(b"access-control-request-headers")
        return [
            (b"access-control-allow-methods", allow.encode()),
            (b"access-control-allow-headers", asked or b"*"),
            (b"access-control-max-age", str(PREFLIGHT_MAX_AGE_SECONDS).encode()),
        ]
