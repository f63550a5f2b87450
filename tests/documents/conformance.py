"""docs/conformance.yaml, what must hold of it, and docs/conformance.md, which is written from it.

It does not know the documents themselves, nor run a test: it reads the test files' syntax trees.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import msgspec

ROOT = Path(__file__).parents[2]
DATA = ROOT / "docs" / "conformance.yaml"
PAGE = ROOT / "docs" / "conformance.md"
TEST_FOLDER = "tests/"
CELLS = {"works": "works", "differs": "differs", "proxy": "the proxy's"}


class Row(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One row of a document: its words, and the tests that show it."""

    id: Annotated[str, msgspec.Meta(pattern=r"^[a-z][\w.-]+$")]
    row: str
    tests: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    status: Literal["works", "differs", "proxy"] = "works"
    remark: str = ""


class Section(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    section: str
    rows: tuple[Row, ...]


class Document(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    document: str
    sections: tuple[Section, ...]


def load() -> tuple[Document, ...]:
    """The data file. Raises msgspec.ValidationError, with the place, where a row lacks its test."""
    return msgspec.yaml.decode(DATA.read_bytes(), type=tuple[Document, ...])


def rows(documents: tuple[Document, ...]) -> Iterator[Row]:
    for document in documents:
        for section in document.sections:
            yield from section.rows


def problems(documents: tuple[Document, ...], root: Path = ROOT) -> list[str]:
    """What is wrong, a line each: ids given twice, tests that do not exist, differences without a reason."""
    found = [
        f"{name}: {n} rows have this id"
        for name, n in Counter(r.id for r in rows(documents)).items()
        if n > 1
    ]
    known: dict[str, frozenset[str]] = {}
    for row in rows(documents):
        if row.status != "works" and not row.remark:
            found.append(f"{row.id}: {row.status}, and no remark says why")
        for test in row.tests:
            path, _, name = test.partition("::")
            if path not in known:
                known[path] = tests_of(root / path) if path.startswith(TEST_FOLDER) else frozenset()
            if name not in known[path]:
                found.append(f"{row.id}: there is no test {test}")
    return found


def tests_of(path: Path) -> frozenset[str]:
    """Names of the tests in a file, `test_f` or `TestClass::test_f`; none where pytest would not look."""
    if not path.is_file() or not (path.name.startswith("test_") and path.suffix == ".py"):
        return frozenset()
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    names: list[str] = []
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, functions):
            names.append(node.name)
        elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            names += [f"{node.name}::{part.name}" for part in node.body if isinstance(part, functions)]
    return frozenset(name for name in names if name.rpartition("::")[2].startswith("test_"))


def summary(documents: tuple[Document, ...]) -> str:
    """How many rows have which status, for the page and the README."""
    counts = Counter(row.status for row in rows(documents))
    return (
        f"{counts['works']} of {counts.total()} rows work as written, {counts['differs']} are answered "
        f"otherwise for the reason given, {counts['proxy']} are Olla's own duty, and each names its tests"
    )


def page(documents: tuple[Document, ...]) -> str:
    """docs/conformance.md."""
    lines = [
        "# Row by row",
        "",
        "<!-- Written from conformance.yaml: make docs -->",
        "",
        f"Every row of the two documents that mlxd answers to: {summary(documents)}. CI fails when "
        "a row has no test (tests/unit/test_documents.py).",
    ]
    for document in documents:
        lines += ["", f"## {document.document}"]
        for section in document.sections:
            lines += ["", f"### {section.section}", "", "| row | | tests |", "|---|---|---|"]
            lines += [_line(row) for row in section.rows]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    words = " · ".join(_code(part) for part in row.row.split(" · "))
    status = CELLS[row.status] + (f": {row.remark}" if row.remark else "")
    return f"| {words} | {status} | {'<br>'.join(_link(test) for test in row.tests)} |"


def _code(text: str) -> str:
    return "`" + text.replace("|", "\\|") + "`"


def _link(test: str) -> str:
    path, _, name = test.partition("::")
    return f"[{name}](../{path})"
