"""Grammars for tool calls, in the formats that the tool parsers read.

It does not know requests or tokens. Every format here takes its arguments as JSON, so that a tool's schema
holds as it is. Where a family has several formats, a call that is asked for comes in one in which its parser
reads JSON, and a call that the model begins by itself is held to all those that begin as it does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlxd.chat.structured import Grammar, literal
from mlxd.chat.tool_parsers import get
from mlxd.chat.types import ToolSpec
from mlxd.text.markers import MarkerScanner

_LEXEMES = re.compile(r"\A\n|.+", re.DOTALL)

MAX_CALLS = 16
"""Calls in one answer that is made of nothing else: a small model would go on for ever."""

_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSyntax:
    """`opening`, then calls with `between` them, then `closing`.

    A call is `before`, its arguments, `after`; {name} stands for the tool's name. `trigger` is the text with
    which the model begins a call by itself, if it then goes on as this syntax or one of the `others` says,
    those that begin so: the rest can be enforced once it has written that. "": it might go on in another way
    that the parser knows.
    """

    before: str
    after: str = ""
    between: str = ""
    opening: str = ""
    closing: str = ""
    trigger: str = ""
    one_only: bool = False
    others: tuple[CallSyntax, ...] = ()

    def rest(self, trigger: str) -> CallSyntax | None:
        """What is left behind the trigger; None where calls do not begin so. Without an opening, one call."""
        if self.opening.startswith(trigger):
            return replace(self, opening=self.opening.removeprefix(trigger))
        if self.opening or not self.before.startswith(trigger):
            return None
        return replace(self, before=self.before.removeprefix(trigger).lstrip(), one_only=True)


def _tagged(before: str, after: str, trigger: str = "") -> CallSyntax:
    return CallSyntax(
        before=f"<tool_call>\n{before}", after=f"{after}\n</tool_call>", between="\n", trigger=trigger
    )


_HERMES = _tagged('{"name": "{name}", "arguments": ', "}", "<tool_call>")
_FUNCTION = CallSyntax(before="<function={name}>", after="</function>", between="\n", trigger="<function=")
_MISTRAL, _DEEPSEEK, _KIMI = "[TOOL_CALLS]", "<｜tool▁calls▁begin｜>", "<|tool_calls_section_begin|>"
_HARMONY = "<|channel|>commentary to=functions."

SYNTAXES: dict[str, CallSyntax] = {
    "auto": _HERMES,
    "hermes": _HERMES,
    "qwen": _HERMES,
    "granite": _HERMES,
    "nemotron": _tagged('{"name": "{name}", "arguments": ', "}"),
    "qwen3_coder": _tagged("<function={name}>\n", "\n</function>"),
    "glm47": CallSyntax(before="<tool_call>{name}\n", after="</tool_call>", between="\n"),
    "mistral": CallSyntax(
        opening=f"{_MISTRAL}[",
        before='{"name": "{name}", "arguments": ',
        after="}",
        between=", ",
        closing="]",
        trigger=_MISTRAL,
        others=(CallSyntax(before=f"{_MISTRAL}{{name}}"), CallSyntax(before=f"{_MISTRAL}{{name}}[ARGS]")),
    ),
    "llama": CallSyntax(
        before='{"name": "{name}", "parameters": ',
        after="}",
        between="; ",
        trigger=_FUNCTION.trigger,
        others=(_FUNCTION,),
    ),
    "deepseek": CallSyntax(
        opening=_DEEPSEEK,
        before="<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n",
        after="\n```<｜tool▁call▁end｜>",
        between="\n",
        closing="<｜tool▁calls▁end｜>",
        trigger=_DEEPSEEK,
        others=(
            CallSyntax(
                opening=_DEEPSEEK,
                before="<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>",
                after="<｜tool▁call▁end｜>",
                closing="<｜tool▁calls▁end｜>",
            ),
        ),
    ),
    "kimi": CallSyntax(
        opening=_KIMI,
        before="<|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>",
        after="<|tool_call_end|>",
        closing="<|tool_calls_section_end|>",
        trigger=_KIMI,
    ),
    "xlam": CallSyntax(
        opening="[", before='{"name": "{name}", "arguments": ', after="}", between=", ", closing="]"
    ),
    "functionary": _FUNCTION,
    "harmony": CallSyntax(
        before=f"{_HARMONY}{{name}} <|constrain|>json<|message|>",
        one_only=True,
        trigger=_HARMONY,
        others=(
            CallSyntax(before=f"{_HARMONY}{{name}} json<|message|>"),
            CallSyntax(before=f"{_HARMONY}{{name}}<|message|>"),
        ),
    ),
    "gemma4": CallSyntax(before="<|tool_call>call:{name}", after="<tool_call|>"),
    "minimax": CallSyntax(
        opening="<minimax:tool_call>\n",
        before='<invoke name="{name}">\n',
        after="\n</invoke>",
        between="\n",
        closing="\n</minimax:tool_call>",
    ),
    "deepseek_v4": CallSyntax(
        opening="<｜DSML｜tool_calls>\n",
        before='<｜DSML｜invoke name="{name}">\n',
        after="\n</｜DSML｜invoke>",
        between="\n",
        closing="\n</｜DSML｜tool_calls>",
    ),
}
"""By the parser's name: every parser has one."""


def call_syntax(parser: str) -> CallSyntax:
    """How calls can be enforced that this parser reads."""
    return SYNTAXES[get(parser).name]


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
        self._parallel = parallel
        self.parts: dict[str, Grammar] = {f"arguments_{i}": grammar for i, grammar in enumerate(arguments)}

    @property
    def trigger(self) -> str:
        """The text that begins a call which the model makes by itself; "" where that cannot be told."""
        return self._syntax.trigger

    def required(self) -> str:
        """One call or more, and nothing else."""
        return self._calls(self._syntax)

    def beginnings(self) -> list[str]:
        """The texts with one of which `required` begins, up to what is the model's to say."""
        syntax = self._syntax
        texts = [syntax.opening + syntax.before.replace("{name}", tool.name) for tool in self._tools]
        return [text.partition("{index}")[0] for text in texts]

    def after_trigger(self) -> str:
        """What follows the trigger: the rest of one call, or of all that stand in one opening."""
        syntax = self._syntax
        ways = [way.rest(syntax.trigger) for way in (syntax, *syntax.others)]
        return " | ".join(f"({self._calls(way)})" for way in ways if way is not None)

    def after_analysis(self, start: str) -> str:
        """`start`, behind a message on Harmony's analysis channel, if there is one."""
        header, end = "<|channel|>analysis<|message|>", "<|end|><|start|>assistant"
        return f"({self.text(header)} /(.|\\n)*/ {self.text(end)})? {start}"

    def text(self, text: str) -> str:
        """A text in Lark: special tokens are no text for llguidance, which knows them by id.

        A line break at its beginning stands for itself: llguidance's lexer takes the longest it can, and
        would be stuck where "\\n" and "\\n</tag>" may both come.
        """
        pieces: list[str] = []
        position = 0
        while position < len(text):
            end, marker = self._scanner.scan(text, position, is_last=True)
            if end > position:
                pieces += map(literal, _LEXEMES.findall(text[position:end]))
            if marker:
                pieces.append(f"<[{self._special_tokens[marker]}]>")
            position = end + len(marker)
        return " ".join(pieces)

    def _calls(self, syntax: CallSyntax) -> str:
        call = f"({self._call(syntax)})"
        calls = call
        if self._parallel and not syntax.one_only:
            calls += f" ({self.text(syntax.between)} {call}){{0,{MAX_CALLS - 1}}}"
        return f"{self.text(syntax.opening)} {calls} {self.text(syntax.closing)}"

    def _call(self, syntax: CallSyntax) -> str:
        """One call of any of the tools."""
        after = self.text(syntax.after)
        return " | ".join(
            f"{self._before(syntax.before.replace('{name}', tool.name))} @{part} {after}"
            for tool, part in zip(self._tools, self.parts, strict=True)
        )

    def _before(self, text: str) -> str:
        head, index, tail = text.partition("{index}")
        return f"{self.text(head)} /[0-9]{{1,3}}/ {self.text(tail)}" if index else self.text(head)
