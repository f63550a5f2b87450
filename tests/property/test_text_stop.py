"""The stop checker against a naive reading of its definition, for every way of cutting the text."""

from __future__ import annotations

from itertools import pairwise

import hypothesis.strategies as st
from hypothesis import given

from mlxd.text.stop import StopChecker

TEXT = st.text("ab\né", max_size=30)
STOPS = st.lists(st.text("ab\né", min_size=1, max_size=6), min_size=1, max_size=5).map(tuple)


def naive(stops: tuple[str, ...], text: str) -> tuple[str, str | None]:
    """Reads character by character; the first stop string to be complete wins, of several the longest."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, None


def cut(text: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(text), *(place % (len(text) + 1) for place in cuts)})
    return [text[a:b] for a, b in pairwise(places)]


@given(stops=STOPS, text=TEXT, cuts=st.lists(st.integers(0, 40), max_size=10))
def test_it_gives_what_the_definition_says_however_the_text_is_cut(
    stops: tuple[str, ...], text: str, cuts: list[int]
) -> None:
    checker = StopChecker(stops)
    emitted, matched = "", None
    for piece in cut(text, cuts):
        safe, matched = checker.feed(piece)
        emitted += safe
        if matched is not None:
            break
    emitted += checker.finish()
    assert (emitted, matched) == naive(stops, text)


@given(stops=STOPS, text=TEXT)
def test_it_holds_back_no_more_than_what_could_become_a_stop_string(
    stops: tuple[str, ...], text: str
) -> None:
    checker = StopChecker(stops)
    seen = emitted = ""
    for character in text:
        seen += character
        safe, matched = checker.feed(character)
        emitted += safe
        if matched is not None:
            return
        held = max(n for n in range(len(seen) + 1) if any(s.startswith(seen[len(seen) - n :]) for s in stops))
        assert emitted == seen[: len(seen) - held]
