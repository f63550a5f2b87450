"""docs/configuration.md, written from mlxd/config.py: its types, limits, defaults and docstrings.

It does not know what the values do beyond what is said there.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import get_args, get_origin

import msgspec

from mlxd import config
from mlxd.cli.describe import allowed
from mlxd.cli.flags import FLAGS

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
HEAD = """\
# Configuration

<!-- Written from mlxd/config.py: make docs -->

Defaults < YAML (`-c server.yaml`) < `MLXD_*` variables < flags; the later wins. A key `section.name` is
`MLXD_SECTION_NAME` as a variable and `--set section.name=value` as a flag; those with a flag of their own
show it. [configs/server.yaml](../configs/server.yaml) has every key with its default. `mlxd check -c FILE`
shows what would be used, with the memory plan, and starts nothing. A wrong key or value names its place, what
was read, what is allowed, and the nearest key that exists; the exit code is 2.
"""


def page() -> str:
    """docs/configuration.md."""
    meanings = _meanings()
    flags = {flag.key: flag.name for flag in FLAGS}
    lines = [HEAD]
    for section in msgspec.structs.fields(config.Config):
        lines += _table(section.type, section.name, meanings, flags)
    lines += _table(config.ApiKeyConfig, "An entry of limits.api_keys", meanings, {})
    return "\n".join(lines)


def undocumented() -> list[str]:
    """Keys without a docstring."""
    meanings = _meanings()
    kinds = [section.type for section in msgspec.structs.fields(config.Config)] + [config.ApiKeyConfig]
    names = [(kind.__name__, field.name) for kind in kinds for field in msgspec.structs.fields(kind)]
    return [f"{kind}.{name}" for kind, name in names if (kind, name) not in meanings]


def _table(
    kind: type[msgspec.Struct], title: str, meanings: dict[tuple[str, str], str], flags: dict[str, str]
) -> list[str]:
    lines = [f"## {title}", "", inspect.cleandoc(kind.__doc__ or ""), ""]
    lines += ["| key | takes | default | meaning |", "|---|---|---|---|"]
    for field in msgspec.structs.fields(kind):
        flag = flags.get(f"{title}.{field.name}")
        name = f"`{field.name}`" + (f"<br>`{flag}`" if flag else "")
        meaning = meanings.get((kind.__name__, field.name), "")
        lines.append(f"| {name} | {_takes(field.type)} | `{_shown(field.default)}` | {meaning} |")
    return [*lines, ""]


def _takes(kind: object) -> str:
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        return "a list of entries, below" if item is config.ApiKeyConfig else f"a list of {allowed(item)}"
    return allowed(kind)


def _shown(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case ():
            return "[]"
        case "":
            return '""'
        case _:
            return str(value)


def _meanings() -> dict[tuple[str, str], str]:
    """The string under each field, by class and name; in one line, fit for a table."""
    found: dict[tuple[str, str], str] = {}
    for node in ast.parse(inspect.getsource(config)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, text in zip(node.body, node.body[1:], strict=False):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                    found[node.name, name] = " ".join(words.split()).replace("|", "\\|")
    return found
