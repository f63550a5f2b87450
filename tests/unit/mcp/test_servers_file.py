"""The file of MCP servers: both notations, variables, and every refusal with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlxd.errors import ConfigError
from mlxd.mcp.servers_file import MAX_FILE_BYTES, MAX_SERVERS, McpServerSpec, read_servers

ENVIRON = {"TOKEN": "secret"}


def read(tmp_path: Path, servers: Any, name: str = "mcp.json") -> tuple[McpServerSpec, ...]:
    path = tmp_path / name
    path.write_text(json.dumps({"mcpServers": servers}))
    return read_servers(path, ENVIRON)


def test_every_key(tmp_path: Path) -> None:
    [files, web, old] = read(
        tmp_path,
        {
            "files": {
                "command": "npx",
                "args": ["-y", "${TOKEN}"],
                "env": {"KEY": "${TOKEN}", "OTHER": "${NONE:-x}"},
                "cwd": "/tmp",
                "timeout": 5,
                "autoApprove": ["other clients' own"],
            },
            "web": {"url": "https://h/mcp", "headers": {"authorization": "Bearer ${TOKEN}"}},
            "old.one": {"type": "sse", "url": "http://h/sse", "allowed_tools": ["a"]},
            "off": {"command": "x", "disabled": True},
            "off-too": {"command": "x", "enabled": False},
        },
    )
    assert files == McpServerSpec(
        name="files",
        transport="stdio",
        command="npx",
        args=("-y", "secret"),
        env={"KEY": "secret", "OTHER": "x"},
        cwd="/tmp",
        timeout_seconds=5,
    )
    assert web == McpServerSpec(
        name="web", transport="http", url="https://h/mcp", headers={"authorization": "Bearer secret"}
    )
    assert old == McpServerSpec(
        name="old.one", transport="sse", url="http://h/sse", allowed_tools=frozenset({"a"})
    )


def test_yaml_and_the_other_name(tmp_path: Path) -> None:
    path = tmp_path / "mcp.yaml"
    path.write_text("servers:\n  one: {command: run, transport: stdio}\n")
    assert read_servers(path, {}) == (McpServerSpec(name="one", transport="stdio", command="run"),)


@pytest.mark.parametrize("name", ["http", "streamable-http", "streamable_http", "streamableHttp"])
def test_names_of_streamable_http(tmp_path: Path, name: str) -> None:
    [spec] = read(tmp_path, {"s": {"url": "http://h", "transport": name}})
    assert spec.transport == "http"


@pytest.mark.parametrize(
    ("servers", "problem"),
    [
        ([], "expected an object with mcpServers"),
        ({"a b": {"command": "x"}}, "a name has 1 to 64"),
        ({"a__b": {"command": "x"}}, "a name has 1 to 64"),
        ({"a" * 65: {"command": "x"}}, "a name has 1 to 64"),
        ({"s": {}}, "mcpServers.s: needs either command or url"),
        ({"s": {"command": "x", "url": "http://h"}}, "needs either command or url"),
        ({"s": {"command": ["x"]}}, r"Expected `str \| null`, got `array` - at `\$.command`"),
        ({"s": {"command": "x", "type": "http"}}, "http needs url"),
        ({"s": {"url": "http://h", "type": "stdio"}}, "stdio needs command"),
        ({"s": {"url": "http://h", "type": "pigeon"}}, "'pigeon' is none of stdio, sse, http"),
        ({"s": {"url": "file:///etc/passwd"}}, "s.url: expected http"),
        ({"s": {"command": "${GONE}"}}, "the environment has no GONE"),
        ({"s": {"command": "x", "timeout": 0}}, "timeout"),
        ({"s": "x"}, "mcpServers.s: Expected `object`"),
        ({f"s{i}": {"command": "x"} for i in range(MAX_SERVERS + 1)}, "at most 64 servers, not 65"),
    ],
)
def test_what_is_refused(tmp_path: Path, servers: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as refusal:
        read(tmp_path, servers)
    assert str(refusal.value).startswith(str(tmp_path / "mcp.json"))
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize("name", ["mcp.json", "mcp.yaml"])
def test_files_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_servers(path, {})
    path.write_bytes(b"{" * 10)
    with pytest.raises(ConfigError, match=name):
        read_servers(path, {})
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match=name):
        read_servers(path, {})
    path.write_bytes(b" " * (MAX_FILE_BYTES + 1))
    with pytest.raises(ConfigError, match="larger than"):
        read_servers(path, {})
