"""Scanners of markers: what one of them costs (tests/property/test_reasoning.py has what they find)."""

from __future__ import annotations

import pytest

from mlxd.text import markers
from mlxd.text.markers import MarkerScanner


def test_a_second_scanner_of_the_same_markers_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request that may think makes some, on the event loop."""
    texts = ("</think>", "<tool_call>", "<｜tool▁calls▁begin｜>")
    first = MarkerScanner(texts)
    monkeypatch.delattr(markers, "_tree")
    assert MarkerScanner(reversed(texts)).scan("a</think>b") == first.scan("a</think>b") == (1, "</think>")


def test_characters_that_only_begin_like_a_marker_are_passed_over_in_bulk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Code is full of them; what a pattern does not decide is compared in Python, place by place."""
    compared: list[str] = []
    is_beginning = MarkerScanner._is_beginning

    def count(scanner: MarkerScanner, text: str) -> bool:
        compared.append(text)
        return is_beginning(scanner, text)

    monkeypatch.setattr(MarkerScanner, "_is_beginning", count)
    scanner = MarkerScanner(("<|reserved_special_token_0|><tool_call>", "</think>"))
    assert scanner.scan("<" * 60) == (59, "") and scanner.scan("a < b, <c> </p> <|x") == (19, "")
    assert compared == ["<"]
    assert scanner.scan("<|re</th") == (4, "")


@pytest.mark.parametrize(
    "texts",
    [["<" + "long" * 500 + ">", "<" + "long" * 400 + "er>"], ["a" * length for length in range(1, 500)]],
    ids=["long", "within one another"],
)
def test_markers_may_be_long_and_many_within_one_another(texts: list[str]) -> None:
    """A model's special tokens may be anything: their patterns must not nest as deep as they are long."""
    scanner = MarkerScanner(texts)
    for marker in (texts[0], texts[-1]):
        text = f"b{marker}b"
        assert scanner.scan(text) == (1, marker)
        assert scanner.scan(text[:-2]) == (1, "")
