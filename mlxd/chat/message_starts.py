"""Where each message begins in a rendered prompt, so that a place in the prompt can be named by its message.

It does not know templates: it looks for what the messages say in what was made of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlxd.chat.messages import Message

MAX_UNFOUND = 64
"""Messages that a template may leave out before nobody looks for the rest: each costs a search to the end."""


def message_starts(text: str, messages: Sequence[Message]) -> tuple[int, ...]:
    """For each message the character of `text` where it begins: its content, or the name of its first call.

    One that is not found begins where the one found before it ends.
    """
    starts: list[int] = []
    end = num_unfound = 0
    for message in messages:
        start = end
        for words in _words(message):
            found = text.find(words, end) if num_unfound < MAX_UNFOUND else -1
            if found >= 0:
                start, end = found, found + len(words)
                break
            num_unfound += 1
        starts.append(start)
    return tuple(starts)


def _words(message: Message) -> list[str]:
    """What to look for, the best first."""
    content = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        content = next((text for text in texts if isinstance(text, str) and text.strip()), None)
    if isinstance(content, str) and content.strip():
        stripped = content.strip()
        return [content] if stripped == content else [content, stripped]
    calls = message.get("tool_calls")
    function = calls[0].get("function") if isinstance(calls, list) and calls else None
    name = function.get("name") if isinstance(function, dict) else None
    return [name] if isinstance(name, str) and name else []
