"""GLM 4.5 to 4.7: `<tool_call>f <arg_key>k</arg_key> <arg_value>v</arg_value> </tool_call>`.

It does not know other families. Format: the chat templates of zai-org/GLM-4.6 and GLM-4.7 (which leaves out
the line breaks between tags). Values are written as they are, strings without quotes.
"""

from __future__ import annotations

import re

from mlxd.chat.tool_parsers.json_calls import read_arguments
from mlxd.chat.tool_parsers.parameters import ParameterWriter
from mlxd.chat.tool_parsers.source import Cut, Reading
from mlxd.chat.tool_parsers.tags import TOOL_CALL_END, TaggedFormat
from mlxd.text.markers import MarkerScanner

_KEY, _KEY_END, _VALUE, _VALUE_END = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"
_KEY_ENDS = MarkerScanner((_KEY_END,))
_VALUE_ENDS = MarkerScanner((_VALUE_END, _KEY, TOOL_CALL_END))
_NAME = re.compile(r"[^<>{}\[\]\s]+")


class GLM47Format(TaggedFormat):
    """Understands the other bodies of `<tool_call>` too."""

    name = "glm47"
    aliases = ("glm4",)
    template_hints = (_KEY,)
    model_types = ("glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa")

    def read_body(self, closer: str) -> Reading[None]:
        source = self.source
        if (yield from source.skip_whitespace()) in ("{", "[", "<"):
            yield from super().read_body(closer)
            return
        call = self.new_call()
        name = yield from source.take(_NAME)
        call.set_name(name)
        if (yield from source.skip_whitespace()) == "{":
            yield from read_arguments(source, call)
            call.end()
            yield from source.accept(TOOL_CALL_END)
            return
        parameters = ParameterWriter(self.session, call, name, trims_newlines=False)
        tag = yield from source.expect(_KEY, TOOL_CALL_END)
        while tag == _KEY:
            pieces: list[str] = []
            if not (yield from source.copy_until(_KEY_ENDS, pieces.append)):
                raise Cut
            yield from source.expect(_VALUE)
            tag = yield from parameters.add("".join(pieces).strip(), _VALUE_ENDS)
            if tag == _VALUE_END:
                tag = yield from source.expect(_KEY, TOOL_CALL_END)
        parameters.close()
        call.end()
