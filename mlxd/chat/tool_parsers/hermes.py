"""Hermes and everything that learned from it: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`.

It does not know other families. Format: https://github.com/NousResearch/Hermes-Function-Calling
"""

from __future__ import annotations

from mlxd.chat.tool_parsers.tags import TaggedFormat


class HermesFormat(TaggedFormat):
    """JSON calls in tags. The tags are plain tokens of those vocabularies."""

    name = "hermes"
    aliases = ("nous",)
    template_hints = ("<tool_call>",)
