"""Messages over the socketpair, blocking: a length, then a msgpack message (mlxd/step.py).

It does not know what the messages mean. One thread receives; any thread may send.
"""

from __future__ import annotations

import socket
import struct
import threading
from typing import Generic, TypeVar

import msgspec

from mlxd.step import HEADER_BYTES, MAX_MESSAGE_BYTES, Message

HEADER = struct.Struct("<I")
assert HEADER.size == HEADER_BYTES

M = TypeVar("M")


class ProtocolError(Exception):
    """The other side sent something that is no message."""


class Channel(Generic[M]):
    """One end of the socketpair, which it owns. `incoming`: the union of messages that may arrive."""

    def __init__(self, sock: socket.socket, incoming: type[M]) -> None:
        sock.setblocking(True)
        self._socket = sock
        self._reader = sock.makefile("rb", buffering=1 << 16)
        self._decoder = msgspec.msgpack.Decoder(incoming)
        self._encoder = msgspec.msgpack.Encoder()
        self._send_lock = threading.Lock()

    def receive(self) -> M:
        """The next message; waits for it. EOFError when the other side is gone."""
        header = self._reader.read(HEADER_BYTES)
        if len(header) < HEADER_BYTES:
            raise EOFError
        (length,) = HEADER.unpack(header)
        if length > MAX_MESSAGE_BYTES:
            raise ProtocolError(f"a message of {length} bytes is over the limit of {MAX_MESSAGE_BYTES}")
        body = self._reader.read(length)
        if len(body) < length:
            raise EOFError
        try:
            return self._decoder.decode(body)
        except msgspec.MsgspecError as error:
            raise ProtocolError(str(error)) from error

    def send(self, message: Message) -> None:
        """Sends all of `message`, waiting while the other side is slow. OSError when it is gone."""
        frame = bytearray(HEADER_BYTES)
        with self._send_lock:
            self._encoder.encode_into(message, frame, HEADER_BYTES)
            HEADER.pack_into(frame, 0, len(frame) - HEADER_BYTES)
            self._socket.sendall(frame)

    def close(self) -> None:
        self._reader.close()
        self._socket.close()
