"""Tools for models whose chat template knows none: described, called and answered in plain text.

It does not know templates or requests. The format is the one that most models have seen, Hermes'
(https://github.com/NousResearch/Hermes-Function-Calling), so the parsers `hermes` and `auto` read it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from mlxd.chat.messages import Message, flatten_content
from mlxd.chat.tools import template_tools
from mlxd.chat.types import ToolSpec

_BEFORE = """\
You can call functions. Each line between <tools> and </tools> describes one of them, in JSON:
<tools>
"""
_AFTER = """
</tools>
To call a function, write its name and its arguments as JSON between <tool_call> tags, like this:
<tool_call>
{"name": "the-function", "arguments": {"an-argument": "its value"}}
</tool_call>
For several calls, write several of these. Then stop: the results come between <tool_response> tags. If no \
function helps, answer without calling any."""


def instructions(tools: Iterable[ToolSpec]) -> str:
    """What the model is told of its tools."""
    return _BEFORE + "\n".join(map(_json, template_tools(tools))) + _AFTER


def with_instructions(
    messages: Sequence[Message], tools: Sequence[ToolSpec], *, supports_system: bool
) -> list[Message]:
    """The messages, with instructions at the end of the system prompt.

    Without a system message there is one now, or, where the template has none, the first user message begins
    with them.
    """
    block = instructions(tools)
    changed = list(messages)
    if changed and changed[0].get("role") in ("system", "developer"):
        text = flatten_content(changed[0].get("content"))
        changed[0] = {**changed[0], "content": f"{text}\n\n{block}" if text else block}
    elif supports_system:
        changed.insert(0, {"role": "system", "content": block})
    else:
        index = next((i for i, message in enumerate(changed) if message.get("role") == "user"), None)
        if index is None:
            changed.insert(0, {"role": "user", "content": block})
        else:
            text = flatten_content(changed[index].get("content"))
            changed[index] = {**changed[index], "content": f"{block}\n\n{text}"}
    return changed


def without_calls(messages: Sequence[Message]) -> list[Message]:
    """The messages with calls and results as text: in the model's turn, and before the user's next words."""
    changed: list[Message] = []
    results: list[str] = []
    for message in messages:
        if message.get("role") == "tool":
            results.append(_result(message))
            continue
        if results:
            text = "\n".join(results)
            results.clear()
            if message.get("role") == "user":
                text = f"{text}\n{flatten_content(message.get('content'))}"
                message = {**message, "content": text}
            else:
                changed.append({"role": "user", "content": text})
        changed.append(_with_text_calls(message) if message.get("tool_calls") else message)
    if results:
        changed.append({"role": "user", "content": "\n".join(results)})
    return changed


def _with_text_calls(message: Message) -> Message:
    texts = [flatten_content(message.get("content"))]
    for call in message["tool_calls"]:
        function = call.get("function") or {}
        arguments = function.get("arguments") or {}
        if not isinstance(arguments, str):
            arguments = _json(arguments)
        # As the model wrote it, JSON or not.
        name = _json(function.get("name"))
        texts.append(f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>')
    others = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**others, "content": "\n".join(text for text in texts if text)}


def _result(message: Message) -> str:
    return f"<tool_response>\n{flatten_content(message.get('content'))}\n</tool_response>"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
