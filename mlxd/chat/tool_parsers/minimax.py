"""MiniMax M2: `<invoke name="f"><parameter name="k">v</parameter></invoke>` in `<minimax:tool_call>`.

It does not know other families. Format: https://huggingface.co/MiniMaxAI/MiniMax-M2, tool calling guide.
"""

from __future__ import annotations

from typing import ClassVar

from mlxd.chat.tool_parsers.invokes import InvokeFormat


class MiniMaxFormat(InvokeFormat):
    name = "minimax"
    aliases = ("minimax_m2",)
    markers: ClassVar[tuple[str, ...]] = ("<minimax:tool_call>",)
    prefix = ""
    blocks = ("minimax:tool_call",)
    preserve_special_tokens = True
    template_hints = ("<minimax:tool_call>",)
    model_types = ("minimax", "minimax_m2")
