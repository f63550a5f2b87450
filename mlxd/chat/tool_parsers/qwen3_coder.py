"""Qwen3-Coder: `<tool_call><function=f><parameter=k>v</parameter></function></tool_call>`.

It does not know other families. Format: the chat template of Qwen/Qwen3-Coder-30B-A3B-Instruct, which puts
values on lines of their own. The outer tag is often missing.
"""

from __future__ import annotations

from typing import ClassVar

from mlxd.chat.tool_parsers.tags import FUNCTION, TOOL_CALL, TaggedFormat


class Qwen3CoderFormat(TaggedFormat):
    name = "qwen3_coder"
    aliases = ("qwen3_xml",)
    markers: ClassVar[tuple[str, ...]] = (TOOL_CALL, FUNCTION)
    template_hints = ("<parameter=",)
    model_types = ("qwen3_5", "qwen3_5_moe", "qwen3_next")
