"""Stop strings: what is emitted, what is held back, what wins. The definition is tested by property."""

from __future__ import annotations

import pytest

from mlxd.errors import InvalidRequestError
from mlxd.text.stop import StopChecker


def test_text_before_the_stop_string_is_emitted_and_the_rest_dropped() -> None:
    checker = StopChecker(("STOP",))
    assert checker.feed("one ST") == ("one ", None)
    assert checker.feed("O") == ("", None)
    assert checker.feed("P two") == ("", "STOP")
    assert checker.feed("three") == ("", "STOP")
    assert checker.finish() == ""


def test_a_false_start_is_let_go() -> None:
    checker = StopChecker(("abcd", "\n\n"))
    assert checker.feed("xabc") == ("x", None)
    assert checker.feed("ab") == ("abc", None)
    assert checker.feed("-\n") == ("ab-", None)
    assert checker.finish() == "\n"


@pytest.mark.parametrize(
    ("stops", "text", "emitted", "matched"),
    [
        (("b", "a"), "xaby", "x", "a"),
        (("ab", "a"), "xaby", "x", "a"),
        (("bc", "abcd"), "xabcd", "xa", "bc"),
        (("b", "ab"), "xaby", "x", "ab"),
        (("aab",), "aaab", "a", "aab"),
        (("]", "^", "-", "\\"), "a\\b", "a", "\\"),
    ],
)
def test_the_first_to_be_complete_wins_then_the_longest(
    stops: tuple[str, ...], text: str, emitted: str, matched: str
) -> None:
    assert StopChecker(stops).feed(text) == (emitted, matched)


@pytest.mark.parametrize("stops", [(), ("a", "")])
def test_empty_stop_strings_are_refused(stops: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequestError, match="empty"):
        StopChecker(stops)
