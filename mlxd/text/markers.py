"""Markers: finds the first of some fixed texts in a growing text, holding back only what may begin one.

It does not know what the markers mean, nor tokens or requests. Stop strings are stop.py's: they cut at the
first that is complete, and may never wait.
"""

from __future__ import annotations

import re
from collections.abc import Iterable


class MarkerScanner:
    """The first marker in reading order; of several that begin at the same place, the longest.

    Immutable, so one serves any number of texts. A marker is reported only once no text to come could make
    an earlier or a longer one of it: the result is the same for every way of cutting the text.
    """

    __slots__ = ("_beginnings", "_first", "_longest", "_pattern", "plain")

    def __init__(self, markers: Iterable[str]) -> None:
        """`markers`: any number (none: nothing is ever found), no empty ones."""
        ordered = sorted(set(markers), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, ordered)) or "(?!)")
        self._longest = len(ordered[0]) if ordered else 0
        self._first = frozenset(marker[0] for marker in ordered)
        self._beginnings = frozenset(marker[:end] for marker in ordered for end in range(1, len(marker)))
        first = re.escape("".join(sorted(self._first)))
        self.plain = re.compile(f"[^{first}]+" if first else "(?s:.+)")
        """matches characters of which none begins a marker"""

    def scan(self, text: str, start: int = 0, *, is_last: bool = False) -> tuple[int, str]:
        """Where the text before the first marker in `text[start:]` ends, and that marker, "" for none.

        Without a marker, what follows that place is to be held back and scanned again with more text behind
        it: less than the longest marker, and nothing if `is_last` (no more text is coming).
        """
        found = self._pattern.search(text, start)
        if found and found.start() <= len(text) - self._longest:
            return found.start(), found[0]  # what may become a marker begins later
        partial = len(text) if is_last else self._partial(text, start)
        if found and (found.start() < partial or partial == len(text)):
            return found.start(), found[0]
        return partial, ""

    def _partial(self, text: str, start: int) -> int:
        """Where what may become a marker begins; the end of `text` where nothing may."""
        for position in range(max(start, len(text) - self._longest + 1), len(text)):
            if text[position] in self._first and text[position:] in self._beginnings:
                return position
        return len(text)
