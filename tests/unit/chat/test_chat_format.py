"""A model's chat format: which parsers it has, what its prompts hold, how answers to them are read."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from mlxd.chat.format import ChatFormat, RenderedChat
from mlxd.chat.template import ChatTemplate
from mlxd.chat.tools import ToolChoice
from mlxd.chat.types import Event, ReasoningDelta, TextDelta, ToolCallDelta, ToolCallStart, ToolSpec
from mlxd.config import ChatConfig
from mlxd.errors import ConfigError
from mlxd.text.thinking import ThinkingTags

TEMPLATES = Path(__file__).parent / "templates"
USER = [{"role": "user", "content": "Hi"}]
TOOLS = (ToolSpec(name="f"), ToolSpec(name="g"))
CALL = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
OPENS = (
    "{% for m in messages %}{{ m.content }}|{% endfor %}{% if add_generation_prompt %}<think>\n{% endif %}"
)
CALLED = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": "{}"}}
HISTORY: list[dict[str, Any]] = [
    *USER,
    {"role": "assistant", "content": "", "tool_calls": [CALLED]},
    {"role": "tool", "tool_call_id": "abcdefghi", "content": "42"},
]


def template(file: str) -> str:
    return (TEMPLATES / f"{file}.jinja").read_text(encoding="utf-8")


def make(
    source: str, model_type: str = "", *, special_tokens: tuple[str, ...] = (), **config: Any
) -> ChatFormat:
    chat_template = ChatTemplate({"default": source}, {"bos_token": "<s>", "eos_token": "</s>"})
    return ChatFormat(ChatConfig(**config), chat_template, model_type, special_tokens)


def render(chat_format: ChatFormat, messages: list[dict[str, Any]] = USER, **options: Any) -> RenderedChat:
    options.setdefault("kwargs", {})
    return chat_format.render(messages, **options)


def read(rendered: RenderedChat, text: str, *, keeps_special_tokens: bool = False) -> list[Event]:
    ids = (f"call_{n:024}" for n in itertools.count())
    pipeline = rendered.answer.pipeline(lambda: next(ids), keeps_special_tokens=keeps_special_tokens)
    return pipeline.feed(text) + pipeline.finish()


@pytest.mark.parametrize(
    ("file", "model_type", "config", "reasoning", "tools"),
    [
        ("qwen3", "qwen3", {}, "qwen3", "qwen"),
        ("chatml", "llama", {}, None, "auto"),
        ("chatml", "llama", {"reasoning_parser": "auto"}, "auto", "auto"),
        ("qwen3", "qwen3", {"reasoning_parser": "auto", "tool_call_parser": "auto"}, "qwen3", "qwen"),
        ("qwen3", "qwen3", {"reasoning_parser": "none", "tool_call_parser": "none"}, None, "none"),
        ("qwen3", "qwen3", {"reasoning_parser": "glm47", "tool_call_parser": "nous"}, "glm4", "hermes"),
        ("mistral", "mistral", {}, None, "mistral"),
        ("deepseek_r1", "qwen2", {}, "deepseek_r1", "deepseek"),
    ],
)
def test_parsers_in_use(
    file: str, model_type: str, config: dict[str, Any], reasoning: str | None, tools: str
) -> None:
    chat_format = make(template(file), model_type, **config)
    assert (chat_format.reasoning_parser, chat_format.tool_parser) == (reasoning, tools)


def test_unknown_names_are_a_mistake_of_the_configuration() -> None:
    for config in ({"reasoning_parser": "x"}, {"tool_call_parser": "x"}):
        with pytest.raises(ConfigError, match="'x'"):
            make("{{ messages }}", **config)


def test_without_thinking_and_tools_text_is_text() -> None:
    rendered = render(make(template("chatml")))
    assert rendered.answer.is_plain and not rendered.answer.thinks
    assert not rendered.answer.needs_special_tokens
    assert rendered.answer.thinking_tags is None
    assert read(rendered, f"<think>a</think>{CALL}") == [TextDelta(f"<think>a</think>{CALL}")]


def test_tools_of_a_template_that_knows_them() -> None:
    rendered = render(make(template("qwen3"), "qwen3"), tools=TOOLS)
    assert rendered.text.count('{"type": "function", "function": {"name": "g"') == 1
    assert "You can call functions" not in rendered.text
    assert read(rendered, f"a {CALL}")[1] == ToolCallStart(0, f"call_{0:024}", "f")


def test_tools_of_a_template_that_knows_none() -> None:
    rendered = render(make(template("chatml")), tools=TOOLS)
    assert rendered.text.startswith("<|im_start|>system\nYou can call functions")
    assert read(rendered, CALL) == [ToolCallStart(0, f"call_{0:024}", "f"), ToolCallDelta(0, "{}")]
    # The operator knows better which format the model writes.
    mistral = render(make(template("chatml"), tool_call_parser="mistral"), tools=TOOLS)
    assert read(mistral, "[TOOL_CALLS]f{}")[0] == ToolCallStart(0, "0" * 9, "f")


def test_a_template_without_system_messages_gets_instructions_in_the_users() -> None:
    rendered = render(make(template("gemma2")), tools=TOOLS)
    assert "<start_of_turn>user\nYou can call functions" in rendered.text


def test_calls_in_the_history() -> None:
    own = render(make(template("qwen3"), "qwen3"), HISTORY)
    assert '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>' in own.text
    assert "<tool_response>\n42\n</tool_response>" in own.text
    # ChatML would print a role that the model has never seen, and no call at all.
    text = render(make(template("chatml")), HISTORY)
    assert text.text == (
        "<|im_start|>user\nHi<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    # DeepSeek R1's template shows calls and knows no tools: what it is told of them decides the format.
    mixed = make(template("deepseek_r1"))
    assert "<｜tool▁call▁begin｜>" in render(mixed, HISTORY).text
    assert "<｜tool▁call▁begin｜>" not in render(mixed, HISTORY, tools=TOOLS).text


@pytest.mark.parametrize(
    ("choice", "shown", "reads"),
    [
        (ToolChoice(), ("f", "g"), True),
        (ToolChoice(mode="none"), (), False),
        (ToolChoice(mode="required"), ("f", "g"), True),
        (ToolChoice(mode="required", names=("f",)), ("f",), True),
    ],
)
def test_choices(choice: ToolChoice, shown: tuple[str, ...], reads: bool) -> None:
    rendered = render(make(template("qwen3"), "qwen3"), tools=TOOLS, tool_choice=choice)
    assert tuple(name for name in "fg" if f'"function": {{"name": "{name}"' in rendered.text) == shown
    assert any(isinstance(event, ToolCallStart) for event in read(rendered, CALL)) is reads
    assert rendered.answer.tool_choice == choice and rendered.answer.tools == choice.offered(TOOLS)


def test_tools_that_nobody_reads_are_shown_all_the_same() -> None:
    rendered = render(make(template("qwen3"), "qwen3", tool_call_parser="none"), tools=TOOLS)
    assert '"name": "f"' in rendered.text
    assert read(rendered, CALL) == [TextDelta(CALL)]


def test_one_call_at_most() -> None:
    choice = ToolChoice(parallel=False)
    rendered = render(make(template("qwen3"), "qwen3"), tools=TOOLS, tool_choice=choice)
    events = read(rendered, "a" + CALL + CALL + "b")
    assert [event.name for event in events if isinstance(event, ToolCallStart)] == ["f"]
    assert [event.text for event in events if isinstance(event, TextDelta)] == ["a"]
    first, second = rendered.answer.end_check(), rendered.answer.end_check()
    assert not first("a" + CALL[:-20]) and not second("a")
    assert first(CALL[-20:]) and first("b") and not second("b")
    assert render(make(template("qwen3"), "qwen3"), tools=TOOLS).answer.max_calls is None


def test_a_block_that_the_prompt_opens() -> None:
    rendered = render(make(OPENS))
    assert rendered.text == "Hi|<think>\n" and rendered.answer.is_open
    assert read(rendered, "a</think>b") == [ReasoningDelta("a"), TextDelta("b")]
    assert rendered.answer.thinking_tags == ThinkingTags(start="<think>", end="</think>", opened=True)


def test_a_block_that_must_not_be_is_closed_at_once() -> None:
    rendered = render(make(OPENS), may_think=False)
    assert rendered.text == "Hi|<think>\n\n</think>\n\n" and not rendered.answer.is_open
    assert read(rendered, "b") == [TextDelta("b")]
    silent = make("{{ messages[0].content }}", reasoning_parser="deepseek_r1")
    assert render(silent).answer.is_open
    quiet = render(silent, may_think=False)
    assert quiet.text == "Hi" and not quiet.answer.is_open


def test_a_message_to_continue_may_be_a_thought() -> None:
    messages = [*USER, {"role": "assistant", "content": "<think>Well"}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    rendered = render(make(OPENS), messages, **options)
    assert rendered.text == "Hi|<think>Well" and rendered.answer.is_open
    messages[-1]["content"] = "<think>Well</think>Yes"
    assert not render(make(OPENS), messages, **options).answer.is_open


def test_calls_end_what_the_engine_counts_as_thinking() -> None:
    rendered = render(make(OPENS, tool_call_parser="hermes"), tools=TOOLS)
    tags = rendered.answer.thinking_tags
    assert tags is not None and "<tool_call>" in tags.interrupts
    events = read(rendered, f"a {CALL}")
    assert events[0] == ReasoningDelta("a") and isinstance(events[1], ToolCallStart)


def test_special_tokens_are_kept_for_parsers_and_not_shown() -> None:
    source = "{{ messages[0].content }}[TOOL_CALLS]{{ tools }}"
    chat_format = make(source, "mistral", special_tokens=("[TOOL_CALLS]", "<pad>"))
    plain = render(chat_format)
    assert not plain.answer.needs_special_tokens
    rendered = render(chat_format, tools=TOOLS)
    assert rendered.answer.needs_special_tokens
    text = "a<pad> [TOOL_CALLS]f{}"
    assert read(rendered, text)[0] == TextDelta("a")
    kept = read(rendered, text, keeps_special_tokens=True)
    assert kept[0] == TextDelta("a<pad>")
    thinks = render(make(source, reasoning_parser="mistral"))
    assert thinks.answer.needs_special_tokens
    assert render(make(source, reasoning_parser="auto")).answer.needs_special_tokens


def test_a_guess_reads_the_first_tag() -> None:
    rendered = render(make(template("chatml"), reasoning_parser="auto"), tools=TOOLS)
    assert rendered.answer.thinks and rendered.answer.thinking_tags is None
    assert read(rendered, "[THINK]a[/THINK]b") == [ReasoningDelta("a"), TextDelta("b")]
    harmony = "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b"
    assert read(rendered, harmony) == [ReasoningDelta("a"), TextDelta("b")]
    assert read(render(make(template("chatml"), reasoning_parser="auto")), harmony) == [
        ReasoningDelta("a"),
        TextDelta("b"),
    ]


def test_harmony_needs_one_parser_for_both() -> None:
    source = "{{ messages[0].content }}<|channel|>analysis{{ tools }}<|start|>assistant"
    rendered = render(make(source, "gpt_oss"), tools=TOOLS)
    text = (
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary to=functions.f "
        "<|constrain|>json<|message|>{}<|call|>"
    )
    assert read(rendered, text) == [
        ReasoningDelta("a"),
        ToolCallStart(0, f"call_{0:024}", "f"),
        ToolCallDelta(0, "{}"),
    ]
    tags = rendered.answer.thinking_tags
    assert tags is not None and tags.repeats
