"""What all connections of one server share.

It does not know protocols or sockets; it is the record that server.py fills and protocol.py reads.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlxd.config import ServerConfig
from mlxd.request_ids import new_request_id
from mlxd.server.asgi import Application
from mlxd.server.responses import DateLine, DescribeError

if TYPE_CHECKING:
    from mlxd.server.exchange import Exchange
    from mlxd.server.protocol import Connection


@dataclass(slots=True)
class ServerContext:
    """One of these a server. `clock` is monotonic, in seconds."""

    app: Application
    config: ServerConfig
    loop: asyncio.AbstractEventLoop
    clock: Callable[[], float]
    date_line: DateLine
    describe_error: DescribeError
    access_log: logging.Logger | None = None
    state: dict[str, Any] = field(default_factory=dict)
    """what the application put there at lifespan startup; each scope gets a shallow copy"""
    request_id_factory: Callable[[], str] = new_request_id
    connections: set[Connection] = field(default_factory=set)
    exchanges: set[Exchange] = field(default_factory=set)
    """those whose application call has not returned; holds their tasks alive"""
    shutting_down: bool = False
    drained: asyncio.Event = field(default_factory=asyncio.Event)
    """set once the server shuts down and the last connection and exchange are gone"""

    def connection_ended(self, connection: Connection) -> None:
        self.connections.discard(connection)
        self.note_drained()

    def exchange_ended(self, exchange: Exchange) -> None:
        self.exchanges.discard(exchange)
        self.note_drained()

    def note_drained(self) -> None:
        if self.shutting_down and not self.connections and not self.exchanges:
            self.drained.set()
