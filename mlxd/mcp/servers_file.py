"""The file of `--mcp-config`: the `mcpServers` that other MCP clients read too, as JSON or YAML.

It does not know the protocol. What it does not name is never run nor reached.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec
import yaml
from msgspec import Meta

from mlxd.errors import ConfigError
from mlxd.named_file import read_named_file

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 1024 * 1024
MAX_SERVERS = 64

Transport = Literal["stdio", "sse", "http"]

_NAME = re.compile(r"[A-Za-z0-9.-](?:_?[A-Za-z0-9.-])*_?")
"""No two underscores in a row: they part a server's name from its tool's."""
MAX_NAME_LENGTH = 64
_TRANSPORTS: dict[str, Transport] = {
    "stdio": "stdio",
    "sse": "sse",
    "http": "http",
    "streamable-http": "http",
    "streamable_http": "http",
    "streamableHttp": "http",
}
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


class McpServerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One server: a command to run (`stdio`), or an address to reach (`sse`, or `http` for streamable HTTP).

    `allowed_tools`: its other tools are hidden; None for all. `timeout_seconds` is that of one call, None for
    the configuration's.
    """

    name: str
    transport: Transport
    command: str = ""
    args: tuple[str, ...] = ()
    env: dict[str, str] = {}
    cwd: str | None = None
    url: str = ""
    headers: dict[str, str] = {}
    allowed_tools: frozenset[str] | None = None
    timeout_seconds: float | None = None


class _Entry(msgspec.Struct, kw_only=True):
    """An entry as it stands in the file; other clients' own keys are passed over."""

    command: str | None = None
    args: list[str] = []
    env: dict[str, str] = {}
    cwd: str | None = None
    url: str | None = None
    headers: dict[str, str] = {}
    type: str | None = None
    transport: str | None = None
    timeout: Annotated[float, Meta(gt=0, le=3600)] | None = None
    allowed_tools: list[str] | None = None
    enabled: bool = True
    disabled: bool = False


def read_servers(path: Path, environ: Mapping[str, str]) -> tuple[McpServerSpec, ...]:
    """The servers that are not disabled. `${NAME}` and `${NAME:-default}` stand for variables of `environ`
    in commands, arguments, variables, addresses and headers.

    Raises ConfigError, which names the file and the place, never a value.
    """
    servers = _load(path)
    if len(servers) > MAX_SERVERS:
        raise ConfigError(f"{path}: at most {MAX_SERVERS} servers, not {len(servers)}")
    return tuple(
        spec
        for name, entry in servers.items()
        if (spec := _read_entry(f"{path}: mcpServers.{name}", str(name), entry, environ)) is not None
    )


def _load(path: Path) -> dict[Any, Any]:
    raw = read_named_file(path, MAX_FILE_BYTES)
    try:
        # JSON first: in YAML a tab may not indent, and strings of digits would be numbers.
        data = msgspec.json.decode(raw) if path.suffix == ".json" else yaml.safe_load(raw)
    except (msgspec.DecodeError, yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from None
    servers = None
    if isinstance(data, dict):
        servers = data.get("mcpServers", data.get("servers"))
    if not isinstance(servers, dict):
        raise ConfigError(f"{path}: expected an object with mcpServers: {{name: {{command or url, …}}}}")
    return servers


def _read_entry(where: str, name: str, data: Any, environ: Mapping[str, str]) -> McpServerSpec | None:
    if not _NAME.fullmatch(name) or len(name) > MAX_NAME_LENGTH:
        raise ConfigError(
            f"{where}: a name has 1 to {MAX_NAME_LENGTH} letters, digits and any of . - _ (never __)"
        )
    try:
        entry = msgspec.convert(data, _Entry)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from None
    unknown = sorted(str(key) for key in data if key not in _Entry.__struct_fields__)
    if unknown:
        logger.info("%s: keys that mlxd does not use: %s", where, ", ".join(unknown))
    if entry.disabled or not entry.enabled:
        return None
    if (entry.command is None) == (entry.url is None):
        raise ConfigError(f"{where}: needs either command or url")
    named = entry.type or entry.transport
    if named is not None and named not in _TRANSPORTS:
        raise ConfigError(f"{where}: transport {named!r} is none of stdio, sse, http")
    transport = _TRANSPORTS[named or ("stdio" if entry.command is not None else "http")]
    if (transport == "stdio") != (entry.command is not None):
        raise ConfigError(f"{where}: {transport} needs {'command' if transport == 'stdio' else 'url'}")

    def fill(text: str) -> str:
        return _fill(where, text, environ)

    url = fill(entry.url or "")
    if transport != "stdio" and urlsplit(url).scheme not in ("http", "https"):
        raise ConfigError(f"{where}.url: expected http:// or https://")
    return McpServerSpec(
        name=name,
        transport=transport,
        command=fill(entry.command or ""),
        args=tuple(fill(arg) for arg in entry.args),
        env={key: fill(value) for key, value in entry.env.items()},
        cwd=entry.cwd,
        url=url,
        headers={key: fill(value) for key, value in entry.headers.items()},
        allowed_tools=None if entry.allowed_tools is None else frozenset(entry.allowed_tools),
        timeout_seconds=entry.timeout,
    )


def _fill(where: str, text: str, environ: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        name, default = match.groups()
        found = environ.get(name, default)
        if found is None:
            raise ConfigError(f"{where}: the environment has no {name}")
        return found

    return _VARIABLE.sub(value, text)
