"""The reasoning formats by name, and which one a model has.

It does not know requests. How to add one: an entry in FORMATS, a rule in `detect` if `auto` should find it,
and a table in tests/unit/chat/reasoning.
"""

from __future__ import annotations

from dataclasses import replace

from mlxd.chat.reasoning.auto import AutoParser
from mlxd.chat.reasoning.base import ReasoningFormat, ReasoningParser
from mlxd.chat.reasoning.gpt_oss import GptOssParser, MuseParser
from mlxd.chat.reasoning.tagged import TaggedParser
from mlxd.chat.reasoning.xtml import XtmlParser
from mlxd.errors import ConfigError
from mlxd.text.thinking import ThinkingTags

AUTO, NONE = "auto", "none"


def _harmony(tags: ThinkingTags) -> ReasoningParser:
    return GptOssParser(in_analysis=tags.opened)


def _muse(tags: ThinkingTags) -> ReasoningParser:
    return MuseParser(in_analysis=tags.opened)


_THINK = ReasoningFormat(
    name="qwen3",
    start="<think>",
    end="</think>",
    closing="\n</think>\n\n",
    make_parser=TaggedParser,
    may_omit_start=True,
    aliases=("qwen",),
)

FORMATS: dict[str, ReasoningFormat] = {
    reasoning_format.name: reasoning_format
    for reasoning_format in (
        _THINK,
        replace(_THINK, name="deepseek_r1", aliases=("deepseek",), always_thinks=True),
        replace(_THINK, name="glm4", aliases=("glm45", "glm47"), may_omit_start=False),
        ReasoningFormat(
            name="gpt_oss",
            start="<|channel|>analysis<|message|>",
            end="<|end|>",
            closing="<|end|><|start|>assistant<|channel|>final<|message|>",
            make_parser=_harmony,
            aliases=("harmony", "openai_gptoss"),
            repeats=True,
            preserve_special_tokens=True,
            tool_parsers=("harmony", "auto"),
        ),
        ReasoningFormat(
            name="gemma4",
            # "thought" is the channel's name; a newline follows it.
            start="<|channel>thought",
            end="<channel|>",
            closing="\n<channel|>",
            make_parser=TaggedParser,
            preserve_special_tokens=True,
        ),
        ReasoningFormat(
            name="mistral",
            start="[THINK]",
            end="[/THINK]",
            closing="[/THINK]",
            make_parser=TaggedParser,
            preserve_special_tokens=True,
        ),
        ReasoningFormat(
            name="longcat",
            start="<longcat_think>",
            end="</longcat_think>",
            closing="\n</longcat_think>\n",
            make_parser=TaggedParser,
            preserve_special_tokens=True,
        ),
        ReasoningFormat(
            name="kimi_k3",
            start="<|open|>think<|sep|>",
            end="<|close|>think<|sep|>",
            closing="<|close|>think<|sep|><|open|>response<|sep|>",
            make_parser=XtmlParser,
            opens_itself=False,
            preserve_special_tokens=True,
        ),
        ReasoningFormat(
            name="muse",
            start="to=self<|message|>",
            end="<|eom|>",
            closing="<|eom|><|start|>assistant to=user<|message|>",
            make_parser=_muse,
            aliases=("muse_spark", "muse_glimmer"),
            repeats=True,
            preserve_special_tokens=True,
        ),
    )
}
"""What docs/reasoning-parsers.md lists; `auto` and `none` are choices, not formats."""

_BY_NAME = {name: f for f in FORMATS.values() for name in (f.name, *f.aliases)}
_MARKS = {
    "<|channel>": "gemma4",
    "[THINK]": "mistral",
    "<longcat_think>": "longcat",
    "<|open|>": "kimi_k3",
    "<atem:function_calls>": "muse",
}
"""Texts of templates that give a format away."""
_BY_TYPE = {"kimi_k3": "kimi_k3", "muse_spark": "muse", "muse_glimmer": "muse"}
_BY_FIRST_TAG = ("qwen3", "gpt_oss", "gemma4", "mistral", "longcat", "kimi_k3", "muse")


def names() -> tuple[str, ...]:
    """What `chat.reasoning_parser` takes."""
    return (*_BY_NAME, AUTO, NONE)


def get(name: str) -> ReasoningFormat:
    """The format with that name or alias; ConfigError where there is none."""
    found = _BY_NAME.get(name)
    if found is None:
        raise ConfigError(f"no reasoning parser is called {name!r} (one of {', '.join(names())})")
    return found


def auto_parser(*, has_tools: bool = False, interrupts: tuple[str, ...] = ()) -> ReasoningParser:
    """The parser for a model of which nothing is known. `has_tools`: a tool parser reads on behind it."""
    formats = [FORMATS[name] for name in _BY_FIRST_TAG]
    return AutoParser([f for f in formats if not (has_tools and f.tool_parsers)], interrupts=interrupts)


def detect(source: str, model_type: str) -> ReasoningFormat | None:
    """The format that the text of a model's chat templates, and its type, suggest; None for no thinking."""
    if model_type == "gpt_oss" or ("<|channel|>" in source and "analysis" in source):
        return FORMATS["gpt_oss"]
    for mark, name in _MARKS.items():
        if mark in source:
            return FORMATS[name]
    if model_type in _BY_TYPE:
        return FORMATS[_BY_TYPE[model_type]]
    if "<think>" not in source and "</think>" not in source:
        return None
    if model_type.startswith("glm") or "[gMASK]" in source:
        return FORMATS["glm4"]
    if model_type.startswith("deepseek") or "<｜Assistant｜>" in source:
        # Where its template never opens the block, deepseek_r1 takes it to be open, which a guess must not.
        return FORMATS["deepseek_r1" if "<think>" in source else "qwen3"]
    return FORMATS["qwen3"]
