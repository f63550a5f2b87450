"""Reads a YAML configuration file, with the line that each key stands on.

It does not know which keys there are; settings.py does.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import yaml

from mlxd.errors import ConfigError
from mlxd.named_file import read_named_file

MAX_FILE_BYTES = 1024 * 1024


class Document(NamedTuple):
    """A parsed file. `lines` maps paths such as `server.port` or `limits.api_keys[0].key` to line numbers."""

    name: str
    data: dict[str, object]
    lines: dict[str, int]

    def origin(self, path: str) -> str:
        """`file:line` of a path."""
        return f"{self.name}:{self.lines.get(path, 1)}"


class _Loader(yaml.SafeLoader):
    """The safe loader, without aliases: no file can grow when it is read."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not supported", problem_mark=mark)
        return super().compose_node(parent, index)


def read_yaml(path: Path) -> Document:
    """Reads `path` (UTF-8, one document, at most MAX_FILE_BYTES; empty is allowed).

    Raises ConfigError, with file and line where they are known, for a file that cannot be read, broken YAML,
    a key given twice, an alias, a tag beyond plain YAML, or a top level that is not a mapping.
    """
    name = str(path)
    raw = read_named_file(path, MAX_FILE_BYTES)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{name}:{line}: not UTF-8") from None
    lines: dict[str, int] = {}
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is not None:
                _walk(node, "", lines)
            data = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}" if mark else name
        raise ConfigError(f"{place}: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: {str(error).splitlines()[0]}") from None
    except (RecursionError, ValueError) as error:
        # Nested too deep, or a scalar that looks like a date and is none (2025-13-45).
        raise ConfigError(f"{name}: {error}") from None
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(
            f"{name}:1: the file must hold sections (server:, model:, …), not a {type(data).__name__}"
        )
    return Document(name, data, lines)


def _walk(node: yaml.Node, path: str, lines: dict[str, int]) -> None:
    """Notes the line of every key and refuses keys given twice, which YAML's loaders let pass."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key.start_mark)
            child = f"{path}.{key.value}" if path else key.value
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{child} is given twice (first on line {lines[child]})",
                    problem_mark=key.start_mark,
                )
            seen.add(key.value)
            lines[child] = key.start_mark.line + 1
            _walk(value, child, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            child = f"{path}[{index}]"
            lines[child] = item.start_mark.line + 1
            _walk(item, child, lines)
