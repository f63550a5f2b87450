"""IBM Granite: `<|tool_call|>[{…}]` and `<tool_call>[…]` (3.x), `<tool_call>{…}</tool_call>` (4.x).

It does not know other families. Format: the chat templates of ibm-granite/granite-3.3-8b-instruct and
ibm-granite/granite-4.0-h-small. Phi-4-mini writes the first, with `<|/tool_call|>` behind it.
"""

from __future__ import annotations

from typing import ClassVar

from mlxd.chat.tool_parsers.tags import TOOL_CALL, TOOL_CALL_END, TaggedFormat


class GraniteFormat(TaggedFormat):
    name = "granite"
    aliases = ("granite3",)
    markers: ClassVar[tuple[str, ...]] = ("<|tool_call|>", TOOL_CALL)
    closers: ClassVar[dict[str, str]] = {"<|tool_call|>": "<|/tool_call|>", TOOL_CALL: TOOL_CALL_END}
    preserve_special_tokens = True
    template_hints = ("<|tool_call|>", "<|start_of_role|>")
    model_types = ("granite", "granitemoe", "granitemoehybrid")
