"""docs/: rows of the reference documents have tests, generated pages are current, links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from tests.documents import configuration, conformance
from tests.documents.conformance import Document, Row, Section

PAGES = [*sorted((conformance.ROOT / "docs").glob("*.md")), *sorted(conformance.ROOT.glob("*.md"))]
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def test_every_row_has_tests_that_exist() -> None:
    assert conformance.problems(conformance.load()) == []


def test_a_row_without_a_test_is_an_error() -> None:
    with pytest.raises(msgspec.ValidationError, match="length >= 1"):
        msgspec.convert({"id": "a.b", "row": "words", "tests": []}, Row)
    with pytest.raises(msgspec.ValidationError, match="tests"):
        msgspec.convert({"id": "a.b", "row": "words"}, Row)


def test_what_is_wrong_with_a_row_is_said(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_x.py").write_text(
        "def test_a(): ...\nasync def test_b(): ...\ndef helper(): ...\n"
        "class TestC:\n    def test_d(self): ...\n"
    )
    (tmp_path / "tests/helpers.py").write_text("def test_a(): ...\n")
    (tmp_path / "test_x.py").write_text("def test_a(): ...\n")

    def problems(*rows: Row) -> list[str]:
        return conformance.problems((Document("d", (Section("s", rows),)),), tmp_path)

    good = ("tests/test_x.py::test_a", "tests/test_x.py::test_b", "tests/test_x.py::TestC::test_d")
    assert problems(Row("a", "", good)) == []
    assert problems(Row("a", "", good), Row("a", "", good)) == ["a: 2 rows have this id"]
    assert problems(Row("a", "", good, "differs")) == ["a: differs, and no remark says why"]
    for test in (
        "tests/test_x.py::test_gone",
        "tests/test_x.py::helper",
        "tests/test_x.py::test_d",
        "tests/test_x.py",
        "tests/test_gone.py::test_a",
        "tests/helpers.py::test_a",
        "test_x.py::test_a",
    ):
        assert problems(Row("a", "", (test,))) == [f"a: there is no test {test}"]


def test_generated_pages_are_current() -> None:
    """If not: make docs."""
    assert conformance.PAGE.read_text() == conformance.page(conformance.load())
    assert configuration.PAGE.read_text() == configuration.page()


def test_the_readme_counts_the_rows() -> None:
    readme = (conformance.ROOT / "README.md").read_text()
    assert conformance.summary(conformance.load()) in " ".join(readme.split())


def test_every_key_is_explained() -> None:
    assert configuration.undocumented() == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = LINK.findall(FENCED.sub("", page.read_text()))
    assert [target for target in targets if not (page.parent / target).exists()] == []
