"""LongCat: `<longcat_tool_call>`, and in it JSON or, as GLM has them, `f <longcat_arg_key>k…` tags.

It does not know other families. Format: the chat templates of meituan-longcat/LongCat-Flash-Chat (JSON) and
LongCat-Flash-Lite (keys and values in tags).
"""

from __future__ import annotations

from typing import ClassVar

from mlxd.chat.tool_parsers.glm47 import ArgumentTags, GLM47Format

LONGCAT_CALL = "<longcat_tool_call>"
LONGCAT_TAGS = ArgumentTags("longcat_", "</longcat_tool_call>")


class LongCatFormat(GLM47Format):
    name = "longcat"
    aliases = ()
    markers: ClassVar[tuple[str, ...]] = (LONGCAT_CALL,)
    closers: ClassVar[dict[str, str]] = {LONGCAT_CALL: LONGCAT_TAGS.call_end}
    tags = LONGCAT_TAGS
    preserve_special_tokens = True
    template_hints = (LONGCAT_CALL,)
    model_types = ("longcat_flash", "longcat_flash_ngram")
