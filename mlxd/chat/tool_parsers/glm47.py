"""GLM 4.5 to 4.7: `<tool_call>f <arg_key>k</arg_key> <arg_value>v</arg_value> </tool_call>`.

It does not know other families. Format: the chat templates of zai-org/GLM-4.6 and GLM-4.7 (which leaves out
the line breaks between tags). Values are written as they are, strings without quotes.
"""

from __future__ import annotations

import re
from typing import ClassVar

from mlxd.chat.tool_parsers.json_calls import read_arguments
from mlxd.chat.tool_parsers.parameters import ParameterWriter
from mlxd.chat.tool_parsers.source import Cut, Reading
from mlxd.chat.tool_parsers.tags import TOOL_CALL_END, TaggedFormat
from mlxd.text.markers import MarkerScanner

_NAME = re.compile(r"[^<>{}\[\]\s]+")


class ArgumentTags:
    """The tags of keys and values; `prefix` stands before their names, `call_end` closes the call."""

    __slots__ = ("call_end", "key", "key_ends", "value", "value_end", "value_ends")

    def __init__(self, prefix: str, call_end: str) -> None:
        self.call_end = call_end
        self.key, self.value = f"<{prefix}arg_key>", f"<{prefix}arg_value>"
        self.value_end = f"</{prefix}arg_value>"
        self.key_ends = MarkerScanner((f"</{prefix}arg_key>",))
        self.value_ends = MarkerScanner((self.value_end, self.key, call_end))


class GLM47Format(TaggedFormat):
    """Understands the other bodies of its tag too: JSON and function tags."""

    name = "glm47"
    aliases: ClassVar[tuple[str, ...]] = ("glm4",)
    tags: ClassVar[ArgumentTags] = ArgumentTags("", TOOL_CALL_END)
    template_hints: ClassVar[tuple[str, ...]] = (tags.key,)
    model_types: ClassVar[tuple[str, ...]] = ("glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa")

    def read_body(self, closer: str) -> Reading[None]:
        source, tags = self.source, self.tags
        if (yield from source.skip_whitespace()) in ("{", "[", "<"):
            yield from super().read_body(closer)
            return
        call = self.new_call()
        name = yield from source.take(_NAME)
        call.set_name(name)
        if (yield from source.skip_whitespace()) == "{":
            yield from read_arguments(source, call)
            call.end()
            yield from source.accept(tags.call_end)
            return
        parameters = ParameterWriter(self.session, call, name, trims_newlines=False)
        tag = yield from source.expect(tags.key, tags.call_end)
        while tag == tags.key:
            pieces: list[str] = []
            if not (yield from source.copy_until(tags.key_ends, pieces.append)):
                raise Cut
            yield from source.expect(tags.value)
            tag = yield from parameters.add("".join(pieces).strip(), tags.value_ends)
            if tag == tags.value_end:
                tag = yield from source.expect(tags.key, tags.call_end)
        parameters.close()
        call.end()
