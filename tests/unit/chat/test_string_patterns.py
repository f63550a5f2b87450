"""Strings that a schema describes, without quotes: formats, and patterns of ECMA 262 in Rust's syntax."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest

from mlxd.chat.string_patterns import Inexpressible, string_pattern
from mlxd.chat.structured import compose, is_possible
from tests.unit.chat.grammar_walk import Walker
from tests.unit.chat.made_schemas import FORMATS, PATTERNS, problems

TEXTS = ["", "a", "b", "ab", "xab", "abx", "a\nb", "1", "ab12", "/", "[", "&&", "-", "a.b", "<", "é", "A_9"]
TEXTS += ["abc-1", "on", "A12-abc", "axxb", "123", "#00ff00"]
NOT_REGULAR = (
    "(?=a)",
    "(?<!a)b",
    r"\bword",
    r"(a)\1",
    "a^b",
    "(^a)",
    "a$b",
    "(?i)a",
    "[]",
    "(a",
    "[a",
    r"\cA",
)


@pytest.fixture(scope="module")
def walker(tmp_path_factory: pytest.TempPathFactory) -> Walker:
    return Walker(str(tmp_path_factory.mktemp("tokenizer")))


def grammar(schema: dict[str, Any]) -> str:
    return compose("@a", {"a": {"lark_grammar": f"start: T\nT: {string_pattern(schema)}"}})


@pytest.mark.parametrize("name", FORMATS)
def test_strings_of_a_format_are_valid(walker: Walker, name: str) -> None:
    source = random.Random(name)
    schema = {"type": "string", "format": name, "maxLength": 60}
    for _ in range(40):
        text = walker.walk(grammar(schema), source)
        assert text is not None
        assert not problems(schema, json.dumps(text)), text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("date", "2024-02-29"),
        ("date-time", "2024-12-31T23:59:59.25+02:00"),
        ("time", "00:00:00Z"),
        ("duration", "P1Y2M3DT4H5M6S"),
        ("duration", "P3W"),
        ("email", "a.b+c@mail.example.com"),
        ("uri", "https://example.com:8080/a/b?c=d&e=%20#f"),
        ("uri", "mailto:a@b.com"),
        ("uuid", "123e4567-e89b-12d3-a456-426614174000"),
        ("ipv4", "192.168.0.1"),
        ("ipv6", "2001:db8::1"),
        ("ipv6", "::"),
        ("ipv6", "1:2:3:4:5:6:7:8"),
        ("hostname", "a-b.example.com"),
    ],
)
def test_the_usual_ones_are_allowed(walker: Walker, name: str, text: str) -> None:
    assert walker.matches(grammar({"format": name}), text)


@pytest.mark.parametrize(
    "pattern",
    [
        *PATTERNS,
        "a",
        "^a",
        "a$",
        "^a|b$",
        "^(a|b)$",
        "^(?:a|ab)+?$",
        r"^\d+$",
        r"^[\w.-]*$",
        r"^[^\d]$",
        "^[a[&]$",
        r"^[\]\-/]$",
        "^/$",
        r"\.",
        "^a.b$",
        "^<$",
        "",
        "^$",
        "a b",
        r"^(?<n>a)b?$",
    ],
)
def test_a_pattern_finds_what_it_finds_elsewhere(walker: Walker, pattern: str) -> None:
    searched = re.compile(pattern.replace("?<", "?P<"), re.ASCII)
    made = grammar({"pattern": pattern})
    for text in TEXTS:
        assert walker.matches(made, text) is bool(searched.search(text)), text


@pytest.mark.parametrize("pattern", NOT_REGULAR)
def test_a_pattern_that_is_none_of_a_regular_language_is_refused(pattern: str) -> None:
    with pytest.raises(Inexpressible):
        string_pattern({"pattern": pattern})


def test_lengths(walker: Walker) -> None:
    made = grammar({"minLength": 2, "maxLength": 3})
    assert [walker.matches(made, text) for text in ("é", "é\n", "日本語", "abcd")] == [0, 1, 1, 0]
    assert string_pattern({}) is None
    assert string_pattern({"maxLength": 10**9}) is None
    for odd in (
        {"minLength": 3, "maxLength": 2},
        {"minLength": -1},
        {"maxLength": "3"},
        {"format": "x"},
    ):
        with pytest.raises(Inexpressible):
            string_pattern(odd)


def test_what_no_string_is_can_be_told() -> None:
    assert is_possible(str(string_pattern({"pattern": "^a{3}$", "maxLength": 5})))
    assert not is_possible(str(string_pattern({"pattern": "^a{9}$", "maxLength": 5})))


def test_a_dash_beside_a_class_is_itself(walker: Walker) -> None:
    """As in ECMA 262; Python and Rust see no such range, or another one."""
    for pattern, good, bad in (
        (r"^[+-\d]+$", ["15", "+-1"], [",", "."]),
        (r"^[\w-z]$", ["-", "a", "z"], ["`", "."]),
        (r"^[.-\w]$", [".", "-", "b"], ["?", "/"]),
        (r"^[\w-.]$", ["-", ".", "x"], ["?"]),
    ):
        made = grammar({"pattern": pattern})
        assert all(walker.matches(made, text) for text in good), pattern
        assert not any(walker.matches(made, text) for text in bad), pattern
    with pytest.raises(Inexpressible):
        grammar({"pattern": "^[^!--]$"})
