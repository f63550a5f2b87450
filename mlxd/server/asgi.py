"""The types of ASGI 3 (https://asgi.readthedocs.io/en/latest/specs/www.html), HTTP spec version 2.4.

They do not know what is in a message; the protocol and the application agree on that by the specification.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

ASGI_VERSIONS = {"version": "3.0", "spec_version": "2.4"}


class ClientDisconnected(ConnectionError):
    """Raised by `send()` once the client has gone (an OSError, as HTTP spec version 2.4 asks)."""
