"""One tool call in the making, and what the readers of one answer share.

It does not know formats: they say the name and write the arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mlxd.chat.tool_parsers.events import EventWriter
from mlxd.chat.tool_parsers.json_output import JsonOutput
from mlxd.chat.tool_parsers.source import Source
from mlxd.chat.types import ToolSpec


class Session:
    """One answer: its text, its events, the tools it may call (none given: any) and the call being read."""

    __slots__ = ("call", "events", "make_id", "source", "tools")

    def __init__(
        self,
        tools: Sequence[ToolSpec] | None,
        make_id: Callable[[], str],
        *,
        max_calls: int | None = None,
    ) -> None:
        self.source = Source()
        self.events = EventWriter(max_calls)
        self.tools = {tool.name: tool for tool in tools or ()}
        self.make_id = make_id
        self.call: Call | None = None

    def fork(self) -> Session:
        """The same answer and tools, for a part of the text that is read by itself."""
        part = Session(None, self.make_id)
        part.tools, part.events = self.tools, self.events
        return part

    def may_call(self, name: str) -> bool:
        """Whether a format that could also be prose may take this name for a tool's."""
        return not self.tools or name in self.tools


class Call:
    """A call begins, for the outside, with the first of its arguments that is certain (or at its end).

    Before that it can still turn out to be text, and its name may be yet to come: then its arguments wait.
    From there on it is a call: whatever happens, its arguments end up as whole JSON.
    """

    __slots__ = ("_events", "_make_id", "_name", "_source", "_waiting", "has_begun", "output")

    def __init__(self, session: Session, make_id: Callable[[], str] | None = None) -> None:
        """`make_id` where the format has ids of its own."""
        self._source = session.source
        self._events = session.events
        self._make_id = make_id or session.make_id
        self._name: str | None = None
        self._waiting: list[str] = []
        self.has_begun = False
        self.output = JsonOutput(self._write)
        session.call = self

    @property
    def name(self) -> str | None:
        return self._name

    def set_name(self, name: str) -> None:
        """To be called once. Malformed where the name is blank or holds unprintable characters."""
        if not name.strip() or not name.isprintable() or self._name is not None:
            self._source.fail()
        self._name = name
        if self._waiting:
            self._begin()

    def end(self) -> None:
        """The call is whole; without arguments they are `{}`. Malformed where no name was set."""
        if self._name is None:
            self._source.fail()
        if not self.has_begun:
            self._write("{}")
        self._events.end_call()
        self._source.record()

    def complete(self) -> None:
        """A call that has begun was cut, or turned malformed: its arguments are closed where they are."""
        self.output.complete()
        self._events.end_call()

    def _write(self, text: str) -> None:
        if self.has_begun:
            self._events.arguments(text)
            self._source.record()
            return
        self._waiting.append(text)
        if self._name is not None:
            self._begin()

    def _begin(self) -> None:
        assert self._name is not None
        self.has_begun = True
        self._events.call(self._name, self._make_id())
        self._events.arguments("".join(self._waiting))
        self._waiting = []
        self._source.record()
