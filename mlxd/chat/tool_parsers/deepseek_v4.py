"""DeepSeek V3.2 and V4: DSML, `<｜DSML｜invoke name="f"><｜DSML｜parameter name="k" string="true">v…`.

It does not know other families. Format: encoding of deepseek-ai/DeepSeek-V3.2 (block `function_calls`), and
of V4 (block `tool_calls`). `string` says whether the value is a string as it stands, or JSON.
"""

from __future__ import annotations

from typing import ClassVar

from mlxd.chat.tool_parsers.invokes import InvokeFormat, find_attribute
from mlxd.chat.tool_parsers.schema import STRING, Types


class DeepSeekV4Format(InvokeFormat):
    name = "deepseek_v4"
    aliases = ("deepseek_v32",)
    prefix = "｜DSML｜"
    blocks = ("｜DSML｜tool_calls", "｜DSML｜function_calls")
    markers: ClassVar[tuple[str, ...]] = (*(f"<{block}>" for block in blocks), f"<{prefix}invoke")
    trims_newlines = False
    preserve_special_tokens = True
    template_hints = ("｜DSML｜",)
    model_types = ("deepseek_v32", "deepseek_v4", "deepseek_v41")

    def value_types(self, key: str, attributes: str) -> Types | None:
        return STRING if find_attribute("string", attributes) == "true" else None
