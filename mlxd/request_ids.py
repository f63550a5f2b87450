"""The id by which a request is answered, logged and asked for: the client's if it will do, else a new one.

It does not know requests. The server and the application choose by it, each where the other does not answer.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable

HEADERS = (b"x-request-id", b"x-olla-request-id")
"""The first one that holds an id that will do counts."""

_SANE = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


def sane_request_id(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The client's, if it may be echoed and logged. `headers` have lower-case names."""
    found = {name: value for name, value in headers if name in HEADERS and _SANE.fullmatch(value)}
    return next((found[name].decode("ascii") for name in HEADERS if name in found), None)


def new_request_id() -> str:
    """32 hexadecimal digits that nobody can guess."""
    return secrets.token_hex(16)
