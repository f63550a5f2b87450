"""NVIDIA Nemotron: function tags or JSON in `<tool_call>`, and `<TOOLCALL>[{…}]</TOOLCALL>`.

It does not know other families. Format: the chat templates of nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B and
nvidia/NVIDIA-Nemotron-Nano-9B-v2.
"""

from __future__ import annotations

from typing import ClassVar

from mlxd.chat.tool_parsers.tags import FUNCTION, TOOL_CALL, TOOL_CALL_END, TaggedFormat


class NemotronFormat(TaggedFormat):
    name = "nemotron"
    markers: ClassVar[tuple[str, ...]] = (TOOL_CALL, "<TOOLCALL>", FUNCTION)
    closers: ClassVar[dict[str, str]] = {TOOL_CALL: TOOL_CALL_END, "<TOOLCALL>": "</TOOLCALL>"}
    template_hints = ("<TOOLCALL>",)
    model_types = ("nemotron_h", "nemotron-nas", "nemotron")
