"""Grammars for tool calls, in the formats that the tool parsers read.

It does not know requests or tokens. Every format here takes its arguments as JSON, so that a tool's schema
holds as it is; where a family has several formats, it is the one in which its parser reads JSON.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlxd.chat.structured import Grammar, literal
from mlxd.chat.tool_parsers import get
from mlxd.chat.types import ToolSpec
from mlxd.text.markers import MarkerScanner

MAX_CALLS = 16
"""Calls in one answer that is made of nothing else: a small model would go on for ever."""

_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSyntax:
    """`opening`, then calls with `between` them, then `closing`.

    A call is `before`, its arguments, `after`; {name} stands for the tool's name. `trigger` is the text with
    which `opening`, or else `before`, begins where the model writes calls so by itself: the rest can be
    enforced once it has written that. "": it might go on in another way that the parser knows.
    """

    before: str
    after: str = ""
    between: str = ""
    opening: str = ""
    closing: str = ""
    trigger: str = ""
    one_only: bool = False


def _tagged(before: str, after: str, trigger: str = "") -> CallSyntax:
    return CallSyntax(
        before=f"<tool_call>\n{before}", after=f"{after}\n</tool_call>", between="\n", trigger=trigger
    )


_HERMES = _tagged('{"name": "{name}", "arguments": ', "}", "<tool_call>")

SYNTAXES: dict[str, CallSyntax] = {
    "auto": _HERMES,
    "hermes": _HERMES,
    "qwen": _HERMES,
    "granite": _HERMES,
    "nemotron": _tagged('{"name": "{name}", "arguments": ', "}"),
    "qwen3_coder": _tagged("<function={name}>\n", "\n</function>"),
    "glm47": CallSyntax(before="<tool_call>{name}\n", after="</tool_call>", between="\n"),
    "mistral": CallSyntax(
        opening="[TOOL_CALLS][",
        before='{"name": "{name}", "arguments": ',
        after="}",
        between=", ",
        closing="]",
    ),
    "llama": CallSyntax(before='{"name": "{name}", "parameters": ', after="}", between="; "),
    "deepseek": CallSyntax(
        opening="<｜tool▁calls▁begin｜>",
        before="<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n",
        after="\n```<｜tool▁call▁end｜>",
        between="\n",
        closing="<｜tool▁calls▁end｜>",
    ),
    "kimi": CallSyntax(
        opening="<|tool_calls_section_begin|>",
        before="<|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>",
        after="<|tool_call_end|>",
        closing="<|tool_calls_section_end|>",
    ),
    "xlam": CallSyntax(
        opening="[", before='{"name": "{name}", "arguments": ', after="}", between=", ", closing="]"
    ),
    "functionary": CallSyntax(before="<function={name}>", after="</function>", between="\n"),
    "harmony": CallSyntax(
        before="<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>", one_only=True
    ),
}
"""By the parser's name. Parsers that are missing read no JSON arguments."""


def call_syntax(parser: str) -> CallSyntax | None:
    """How calls can be enforced that this parser reads; None where they cannot."""
    return SYNTAXES.get(get(parser).name)


def arguments_schema(tool: ToolSpec) -> dict[str, Any]:
    """The JSON schema of a tool's arguments, an object in any case; a tool without one takes none."""
    return {**tool.parameters, "type": "object"} if tool.parameters else dict(_NO_ARGUMENTS)


class CallGrammar:
    """The calls of some tools, in Lark, to be composed with `parts`: the grammars of their arguments."""

    def __init__(
        self,
        syntax: CallSyntax,
        tools: Sequence[ToolSpec],
        arguments: Sequence[Grammar],
        *,
        special_tokens: Mapping[str, int],
        parallel: bool,
    ) -> None:
        """`arguments` are the grammars of the tools' arguments; `special_tokens` are ids by text."""
        self._syntax = syntax
        self._tools = tools
        self._special_tokens = special_tokens
        self._scanner = MarkerScanner(special_tokens)
        self._parallel = parallel and not syntax.one_only
        self.parts: dict[str, Grammar] = {f"arguments_{i}": grammar for i, grammar in enumerate(arguments)}

    @property
    def trigger(self) -> str:
        """The text that begins a call which the model makes by itself; "" where that cannot be told."""
        return self._syntax.trigger

    def required(self) -> str:
        """One call or more, and nothing else."""
        return self._calls(self._syntax.opening, self._syntax.before)

    def after_trigger(self) -> str:
        """What follows the trigger: the rest of one call, or of all that stand in one opening."""
        syntax = self._syntax
        if syntax.opening:
            return self._calls(syntax.opening.removeprefix(syntax.trigger), syntax.before)
        return f"({self._call(syntax.before.removeprefix(syntax.trigger).lstrip())})"

    def after_analysis(self, start: str) -> str:
        """`start`, behind a message on Harmony's analysis channel, if there is one."""
        header, end = "<|channel|>analysis<|message|>", "<|end|><|start|>assistant"
        return f"({self.text(header)} /(.|\\n)*/ {self.text(end)})? {start}"

    def text(self, text: str) -> str:
        """A text in Lark: special tokens are no text for llguidance, which knows them by id."""
        pieces: list[str] = []
        position = 0
        while position < len(text):
            end, marker = self._scanner.scan(text, position, is_last=True)
            if end > position:
                pieces.append(literal(text[position:end]))
            if marker:
                pieces.append(f"<[{self._special_tokens[marker]}]>")
            position = end + len(marker)
        return " ".join(pieces)

    def _calls(self, opening: str, before: str) -> str:
        syntax, call = self._syntax, self._call(before)
        calls = f"({call})"
        if self._parallel:
            calls += f" ({self.text(syntax.between)} ({call})){{0,{MAX_CALLS - 1}}}"
        return f"{self.text(opening)} {calls} {self.text(syntax.closing)}"

    def _call(self, before: str) -> str:
        """One call of any of the tools."""
        after = self.text(self._syntax.after)
        return " | ".join(
            f"{self._before(before.replace('{name}', tool.name))} @{part} {after}"
            for tool, part in zip(self._tools, self.parts, strict=True)
        )

    def _before(self, text: str) -> str:
        head, index, tail = text.partition("{index}")
        return f"{self.text(head)} /[0-9]{{1,3}}/ {self.text(tail)}" if index else self.text(head)
