"""The web page at `/`: its files, read once, with ETags and a policy that keeps everything else out.

It does not know what the page does. There is no data in it, so nobody needs a key for it; what it then asks
the API for is asked with the user's.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from mlxd.api.http import Headers, HTTPRequest
from mlxd.api.services import Services

FOLDER = Path(__file__).parent / "web"
INDEX = "index.html"
MEDIA_TYPES = {
    ".css": b"text/css; charset=utf-8",
    ".html": b"text/html; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".svg": b"image/svg+xml",
}
POLICY: Headers = [
    (
        b"content-security-policy",
        # No inline script or style, no other origin, no frame; and no string is ever parsed as HTML.
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        b"require-trusted-types-for 'script'; trusted-types 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
]


class StaticFile:
    """A handler that answers with one file, or 304 to who has it already (RFC 9110 section 13.1.2)."""

    __slots__ = ("_body", "_etag", "_headers", "_media_type")

    def __init__(self, path: Path) -> None:
        self._body = path.read_bytes()
        self._media_type = MEDIA_TYPES[path.suffix]
        self._etag = b'"%b"' % hashlib.sha256(self._body).hexdigest()[:32].encode()
        # no-cache: kept, but asked about each time, so that a new version of the server has its own page.
        self._headers: Headers = [(b"etag", self._etag), (b"cache-control", b"no-cache"), *POLICY]

    async def __call__(self, request: HTTPRequest, services: Services) -> None:
        if self._is_known(request.header_values(b"if-none-match")):
            await request.respond_empty(self._headers, status=304)
        else:
            await request.respond(200, self._body, self._media_type, self._headers)

    def _is_known(self, conditions: list[bytes]) -> bool:
        tags = [tag.strip().removeprefix(b"W/") for tag in b",".join(conditions).split(b",")]
        return self._etag in tags or b"*" in tags


def web_page() -> dict[str, StaticFile]:
    """The page's files by path: its HTML at `/`, the rest below `/web/`."""
    return {
        "/" if path.name == INDEX else f"/web/{path.name}": StaticFile(path)
        for path in sorted(FOLDER.iterdir())
        if path.suffix in MEDIA_TYPES
    }
