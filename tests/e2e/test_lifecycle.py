"""A worker that is killed, a server that is told to stop, a Unix socket."""

from __future__ import annotations

import os
import signal
import socket
import time

import openai
import pytest

from bench.serve.http import Address
from tests.e2e.sdk import connect, played, user


def slow(seconds: float, rate: float = 50.0, **server: object) -> dict[str, object]:
    """A playback server that takes `seconds` before it cuts streams at shutdown."""
    worker = {"backend": "playback", "playback_tokens_per_second": rate}
    return {"worker": worker, "server": {"shutdown_seconds": seconds, **server}}


def test_a_stream_goes_on_after_its_workers_death(start):
    server = start(slow(5.0))
    text = " ".join(f"w{number}" for number in range(60))
    with connect(server) as client:
        first_pid = server.worker_pid()
        stream = client.chat.completions.create(model="default", messages=user(played(text)), stream=True)
        chunks = [next(stream), next(stream)]
        os.kill(first_pid, signal.SIGKILL)
        server.wait_until(lambda: server.status()["worker"]["state"] != "ready", 10.0, "the death")
        with pytest.raises(openai.InternalServerError) as refused:
            # Until the new worker is up: 503 with a retry-after.
            client.with_options(max_retries=0).chat.completions.create(
                model="default", messages=user(played("again"))
            )
        assert refused.value.status_code == 503
        assert int(refused.value.response.headers["retry-after"]) >= 1
        chunks += stream
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == "stop"
    status = server.wait_idle()
    assert (status["worker"]["restarts"], status["worker"]["resumed_requests"]) == (1, 1)
    assert status["worker"]["pid"] != first_pid
    assert status["cache"]["used_blocks"] == 0


def raw_stream(url: str, text: str) -> socket.socket:
    """A socket on which a stream has begun."""
    address = Address.parse(url)
    connection = socket.create_connection((address.host, address.port), timeout=20)
    body = b'{"model":"default","stream":true,"messages":[{"role":"user","content":"%s"}]}'
    body %= played(text).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    connection.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
    received = b""
    while received.count(b"data: ") < 3:
        received += connection.recv(65536)
    return connection


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


def test_sigterm_lets_a_stream_finish(start):
    server = start(slow(20.0))
    with raw_stream(server.url, "x" * 50) as connection:
        server.process.send_signal(signal.SIGTERM)
        rest = read_all(connection)
    assert rest.count(b'"content":"x"') >= 40
    assert b'"finish_reason":"stop"' in rest
    assert rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert server.stop() == 0


def test_sigterm_cuts_a_long_stream_with_a_proper_last_frame(start):
    server = start(slow(0.3))
    with raw_stream(server.url, "x" * 5000) as connection:
        server.process.send_signal(signal.SIGTERM)
        rest = read_all(connection)
    assert rest.count(b"data: [DONE]") == 1
    assert rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert b"shutting down" in rest
    assert server.stop() == 0


def test_sigterm_without_requests_is_quick(start):
    server = start(slow(20.0))
    began = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - began < 5


def test_a_unix_socket(start, tmp_path):
    path = tmp_path / "mlxd.sock"
    server = start({"worker": {"backend": "playback"}, "server": {"unix_socket": str(path)}})
    assert server.url == f"unix:{path}"
    with connect(server) as client:
        answer = client.chat.completions.create(model="default", messages=user(played("local")))
    assert answer.choices[0].message.content == "local"
    assert server.stop() == 0
    assert not path.exists()
