"""What the server refuses by itself: in the dialect of the path, counted and logged as what was answered."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from tests.unit.api.stack import ACCESS_LOGGER, Stack, play
from tests.wire.harness import Response

LIMITS = {"max_request_line_bytes": 100, "max_header_bytes": 500, "max_body_bytes": 1000}
ORIGIN = "https://chat.example.org"
SETTINGS = {"server": {"metrics": True, "cors_origins": [ORIGIN], **LIMITS}}
PATHS = ["/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens"]
HEAD = "POST {path} HTTP/1.1\r\nHost: h\r\nX-Request-Id: mine\r\nOrigin: " + ORIGIN + "\r\n"
SIZED = HEAD + "Content-Length: 9\r\n\r\nab"
CHUNKED = HEAD + "Transfer-Encoding: chunked\r\n\r\n"


def check(response: Response, path: str, status: int) -> None:
    """The status, and a body of the path's dialect that says the same."""
    assert (response.status, response.headers[b"connection"]) == (status, b"close")
    assert response.headers[b"x-request-id"] == b"mine"
    assert response.headers[b"access-control-allow-origin"] == ORIGIN.encode()
    assert response.headers.get(b"request-id") == (b"mine" if path.startswith("/v1/messages") else None)
    body = json.loads(response.body)
    if path.startswith("/v1/messages"):
        assert set(body) == {"type", "error", "request_id"} and set(body["error"]) == {"type", "message"}
        kind = "request_too_large" if status == 413 else "invalid_request_error"
        assert (body["type"], body["error"]["type"], body["request_id"]) == ("error", kind, "mine")
    else:
        assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("status", "request_"),
    [
        (400, HEAD + "Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n"),
        (400, HEAD + "Content-Length: x\r\n\r\n"),
        (400, CHUNKED + "nonsense\r\n"),
        (413, HEAD + "Content-Length: 1001\r\n\r\n"),
        (431, HEAD + "X: " + "y" * 500 + "\r\n\r\n"),
    ],
)
def test_refusals_are_in_the_dialect_of_the_path(
    model_folder: Path, caplog: pytest.LogCaptureFixture, path: str, status: int, request_: str
) -> None:
    async def scenario(stack: Stack) -> None:
        client = stack.connect()
        await client.send_raw(request_.format(path=path).encode())
        check(await client.response(), path, status)

    with caplog.at_level(logging.INFO, logger=ACCESS_LOGGER):
        play(scenario, model_folder, SETTINGS)
    [line] = [record for record in caplog.records if record.name == ACCESS_LOGGER]
    assert (line.method, line.path, line.status) == ("POST", path, status)  # type: ignore[attr-defined]
    assert line.request_id == "mine"  # type: ignore[attr-defined]
    assert line.error != "client_closed_request"  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", PATHS)
def test_a_target_that_is_too_long_has_a_dialect_too(model_folder: Path, path: str) -> None:
    async def scenario(stack: Stack) -> None:
        client = stack.connect()
        await client.send_raw(f"GET {path}?{'x' * 100} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        response = await client.response()
        assert response.status == 414
        assert ("request_id" in json.loads(response.body)) is path.startswith("/v1/messages")

    play(scenario, model_folder, SETTINGS)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("request_", [SIZED, CHUNKED + "2\r\nab\r\n"])
def test_a_slow_body_is_counted_and_logged_as_408(
    model_folder: Path, caplog: pytest.LogCaptureFixture, path: str, request_: str
) -> None:
    async def scenario(stack: Stack) -> None:
        client = stack.connect()
        await client.send_raw(request_.format(path=path).encode())
        stack.time += 100
        client.connection.check_time(stack.time)
        check(await client.response(), path, 408)
        await stack.until(lambda: not stack.context.exchanges)
        page = (await stack.ask("GET", "/metrics")).body.decode()
        assert f'mlxd_requests_total{{endpoint="{path}",finish_reason="",status="408"}} 1.0' in page
        assert "499" not in page

    with caplog.at_level(logging.INFO):
        play(scenario, model_folder, SETTINGS)
    line = next(record for record in caplog.records if record.name == ACCESS_LOGGER)
    assert (line.status, line.error) == (408, "request_timeout")  # type: ignore[attr-defined]
    assert "client left" not in caplog.text


def test_slow_headers_have_a_dialect_once_the_path_is_there(model_folder: Path) -> None:
    async def scenario(stack: Stack) -> None:
        client = stack.connect()
        await client.send_raw(HEAD.format(path="/v1/messages").encode() + b"X: unfinished")
        stack.time += 100
        client.connection.check_time(stack.time)
        check(await client.response(), "/v1/messages", 408)

    play(scenario, model_folder, SETTINGS)


def test_a_refused_head_request_gets_no_body(model_folder: Path) -> None:
    async def scenario(stack: Stack) -> None:
        client = stack.connect()
        await client.send_raw(b"HEAD / HTTP/1.1\r\n\r\n")
        head, _, body = client.output.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ") and body == b""

    play(scenario, model_folder, SETTINGS)
