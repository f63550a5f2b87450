"""Stop strings: finds the first one in a growing text, and holds back what may become one.

It does not know tokens or requests; end-of-sequence ids are the engine's.
"""

from __future__ import annotations

import re
from collections import deque

from mlxd.errors import InvalidRequestError


class StopChecker:
    """An Aho-Corasick automaton over the stop strings, fed piece by piece.

    The stop string that is complete first wins; of several complete at the same character the longest (the
    one that starts first). So "a" wins over "ab", and no decision ever waits for text that is yet to come:
    the result is the same for every way of cutting the text, and the model never runs on to settle it.

    The automaton's state is the longest suffix of the text that begins some stop string, which is exactly
    what must be held back. Cost: linear in the text, whatever the number of stop strings, and each piece
    copies what is held back (less than the longest stop string).
    """

    __slots__ = ("_depth", "_fail", "_first", "_goto", "_held", "_match", "_matched", "_state")

    def __init__(self, stop: tuple[str, ...]) -> None:
        """`stop` holds one or more strings, none empty; else InvalidRequestError."""
        if not stop or not all(stop):
            raise InvalidRequestError("stop strings cannot be empty", param="stop")
        self._goto: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._match: list[str | None] = [None]
        for string in stop:
            self._add(string)
        self._fail = self._failure_links()
        self._first = re.compile("[" + "".join(map(re.escape, self._goto[0])) + "]")
        self._state = 0
        self._held = ""
        self._matched: str | None = None

    def feed(self, text: str) -> tuple[str, str | None]:
        """Takes the next piece; returns the text now safe to emit and the stop string found, if any.

        What stands before the stop string is emitted; it and everything after it are dropped. After a match
        every call returns ("", that string).
        """
        if self._matched is not None:
            return "", self._matched
        start = 0
        if not self._state:
            found = self._first.search(text)
            if found is None:
                return text, None
            start = found.start()
        goto, fail, match, state = self._goto, self._fail, self._match, self._state
        for position in range(start, len(text)):
            character = text[position]
            following = goto[state].get(character)
            while following is None and state:
                state = fail[state]
                following = goto[state].get(character)
            state = following or 0
            stop = match[state]
            if stop is not None:
                self._matched = stop
                seen = self._held + text[: position + 1]
                self._held = ""
                return seen[: len(seen) - len(stop)], stop
        self._state = state
        seen = self._held + text
        safe = len(seen) - self._depth[state]
        self._held = seen[safe:]
        return seen[:safe], None

    def finish(self) -> str:
        """The text held back, once no more is coming."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _add(self, string: str) -> None:
        state = 0
        for depth, character in enumerate(string, start=1):
            following = self._goto[state].get(character)
            if following is None:
                following = self._goto[state][character] = len(self._goto)
                self._goto.append({})
                self._depth.append(depth)
                self._match.append(None)
            state = following
        self._match[state] = string

    def _failure_links(self) -> list[int]:
        """For each state the longest proper suffix that is a state too; breadth first, so it is known.

        A state that is no stop string itself but ends in one takes over the longest such one.
        """
        fail = [0] * len(self._goto)
        queue = deque(self._goto[0].values())
        while queue:
            state = queue.popleft()
            for character, child in self._goto[state].items():
                suffix = fail[state]
                while suffix and character not in self._goto[suffix]:
                    suffix = fail[suffix]
                fail[child] = self._goto[suffix].get(character, 0)
                if self._match[child] is None:
                    self._match[child] = self._match[fail[child]]
                queue.append(child)
        return fail
