"""Markers: finds the first of some fixed texts in a growing text, holding back only what may begin one.

It does not know what the markers mean, nor tokens or requests. Stop strings are stop.py's: they cut at the
first that is complete, and may never wait.
"""

from __future__ import annotations

import functools
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, takewhile

MAX_BRANCHINGS = 32
"""that lie within one another in a pattern: Python reads and compiles them by recursion"""
KNOWN_BY = 4
"""characters of a marker that a pattern looks for where the marker may be cut off; the rest is compared"""


class MarkerScanner:
    """The first marker in reading order; of several that begin at the same place, the longest.

    Immutable, so one serves any number of texts. A marker is reported only once no text to come could make
    an earlier or a longer one of it: the result is the same for every way of cutting the text.
    """

    __slots__ = ("_beginning", "_longest", "_marker", "_markers", "plain")

    def __init__(self, markers: Iterable[str]) -> None:
        """`markers`: any number (none: nothing is ever found), no empty ones."""
        self._markers = tuple(sorted(set(markers)))
        self._longest = max(map(len, self._markers), default=1)
        self._marker, self._beginning, self.plain = _compiled(self._markers)
        """`plain` matches characters of which none begins a marker"""

    def scan(self, text: str, start: int = 0, *, is_last: bool = False) -> tuple[int, str]:
        """Where the text before the first marker in `text[start:]` ends, and that marker, "" for none.

        Without a marker, what follows that place is to be held back and scanned again with more text behind
        it: less than the longest marker, and nothing if `is_last` (no more text is coming).
        """
        found = self._marker.search(text, start)
        end, marker = (len(text), "") if found is None else (found.start(), found[0])
        if is_last:
            return end, marker
        cut = self._beginning.search(text, max(start, len(text) - self._longest + 1))
        while cut is not None and (place := cut.start()) <= end:
            if self._is_beginning(text[place:]):
                return place, ""
            cut = self._beginning.search(text, place + 1)
        return end, marker

    def _is_beginning(self, text: str) -> bool:
        """Of a marker that is longer."""
        markers = self._markers
        place = bisect_left(markers, text)
        if place < len(markers) and markers[place] == text:
            place += 1
        return place < len(markers) and markers[place].startswith(text)


@functools.lru_cache(maxsize=64)
def _compiled(markers: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    """A scanner's patterns: every request makes some of the same, and trees of many markers take long."""
    first = re.escape("".join(sorted({marker[0] for marker in markers})))
    plain = f"[^{first}]+" if first else "(?s:.+)"
    beginning = "|".join(_cut_trees(markers, KNOWN_BY)) or "(?!)"
    return re.compile(_tree(markers)), re.compile(beginning), re.compile(plain)


def _tree(texts: Sequence[str], depth: int = 0) -> str:
    """A pattern for the longest of `texts` (sorted, none twice) that stands there.

    A tree: a model may have thousands of special tokens, most of them alike.
    """
    if not texts:
        return "(?!)"
    if depth == MAX_BRANCHINGS:
        return f"(?:{'|'.join(map(re.escape, sorted(texts, key=len, reverse=True)))})"
    # Sorted, so that what the outermost begin with is what all do.
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(texts[0], texts[-1], strict=False))
    stem = "".join(character for character, _ in pairs)
    rests = [text[len(stem) :] for text in texts]
    ways = [_tree(list(group), depth + 1) for _, group in groupby(filter(None, rests), key=lambda t: t[0])]
    if not rests[0]:
        ways.append("")
    return re.escape(stem) + (f"(?:{'|'.join(ways)})" if len(ways) > 1 else ways[0])


def _cut_trees(texts: Sequence[str], length: int) -> Iterator[str]:
    """Patterns for `length` characters that one of `texts` (sorted) begins with, or fewer at the end of all,
    but one at least."""
    for first, group in groupby(filter(None, texts), key=lambda text: text[0]):
        if length == 1:
            yield re.escape(first)
        else:
            ways = [*_cut_trees([text[1:] for text in group], length - 1), r"\Z"]
            yield re.escape(first) + f"(?:{'|'.join(ways)})"
