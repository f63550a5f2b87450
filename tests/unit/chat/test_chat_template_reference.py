"""Prompts equal transformers' `apply_chat_template`, string for string, for the public formats' templates."""

from __future__ import annotations

import copy
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import pytest
from tokenizers import Tokenizer, models

from mlxd.chat.template import ChatTemplate
from mlxd.errors import InvalidRequestError

TEMPLATES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted(Path(__file__).parent.glob("templates/*.jinja"))
}

VARIABLES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'The weather <now> & "here", 5 °C',
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def called(name: str, arguments: Any, call_id: str = "a1b2c3d4e") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(content: str, call_id: str = "a1b2c3d4e") -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": call_id}


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one user": [user("What is <2> & 'x'? 日本 🙂")],
    "system": [system("Be brief.\n"), user("Hi")],
    "turns": [user("  Hi \n"), assistant(" Hello! \n"), user("Bye\n\n")],
    "system and turns": [
        system(" You are X. "),
        user("a"),
        assistant("b"),
        user("c"),
        assistant("d"),
        user("e"),
    ],
    "ends with assistant": [user("a"), assistant("b")],
    "thoughts in the text": [user("a"), assistant("<think>\nhm\n</think>\n\nb"), user("c")],
    "thoughts apart": [user("a"), assistant("b", reasoning_content="hm")],
    "thoughts by another name": [user("a"), assistant("b", reasoning="hm"), user("c")],
    "roles do not alternate": [user("a"), user("b")],
    "system in the middle": [user("a"), system("b"), user("c")],
    "nulls": [user("a"), assistant("b", tool_calls=None, name=None), user("c")],
    "a call": [
        user("Weather?"),
        assistant(None, tool_calls=[called("get_weather", {"city": "Köln <&>", "days": 2})]),
        result('{"t": 5}'),
    ],
    "a call and an answer": [
        system("Use tools."),
        user("Weather?"),
        assistant("Let me look.", tool_calls=[called("get_weather", {"city": "Oslo"})]),
        result("cold"),
        assistant("It is cold."),
        user("Thanks"),
    ],
    "two calls": [
        user("Weather?"),
        assistant("", tool_calls=[called("get_weather", {"city": "Rome"}), called("now", {}, "b1b2c3d4e")]),
        result("warm"),
        result("12:00", "b1b2c3d4e"),
    ],
    "parts": [
        user([{"type": "text", "text": "Hello "}]),
        assistant("b"),
        user([{"type": "text", "text": "c"}]),
    ],
    "parts of the system": [system([{"type": "text", "text": "Be brief."}]), user("a")],
}

STRING_ARGUMENTS = {"deepseek_r1"}
PARTS = {
    "gemma3": {"user", "assistant", "system"},
    "llama3_2_vision": {"user", "assistant"},
    "parts_only": {"user", "assistant", "system", "tool"},
}
PARTS_ALONE = {"parts_only"}


class Reference:
    """transformers, imported once; given each template's messages as its users would give them."""

    def __init__(self) -> None:
        from transformers import PreTrainedTokenizerFast

        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **VARIABLES)

    def render(self, name: str, messages: list[dict[str, Any]], **options: Any) -> str | None:
        """The prompt; None where the template raises."""
        options = {"add_generation_prompt": True, "tokenize": False, **options}
        messages = copy.deepcopy(messages)
        for message in messages:
            content = message["content"]
            if isinstance(content, list) and message["role"] not in PARTS.get(name, ()):
                message["content"] = "\n".join(part["text"] for part in content)
            if isinstance(content, str) and name in PARTS_ALONE:
                message["content"] = [{"type": "text", "text": content}]
            for call in (message.get("tool_calls") or ()) if name in STRING_ARGUMENTS else ():
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        try:
            text = self.tokenizer.apply_chat_template(messages, chat_template=TEMPLATES[name], **options)
        except (jinja2.TemplateError, TypeError, ValueError):
            return None
        assert isinstance(text, str)
        return text


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@pytest.fixture(scope="module")
def templates() -> dict[str, ChatTemplate]:
    return {
        name: ChatTemplate({"default": text}, VARIABLES, clock=datetime.now)
        for name, text in TEMPLATES.items()
    }


def ours(template: ChatTemplate, messages: list[dict[str, Any]], **options: Any) -> str | None:
    """Our prompt for what an OpenAI client sends: arguments as JSON text."""
    messages = copy.deepcopy(messages)
    for message in messages:
        for call in message.get("tool_calls") or ():
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    before = copy.deepcopy(messages)
    try:
        return template.render(messages, **options)
    except InvalidRequestError:
        return None
    finally:
        assert messages == before


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_what_transformers_renders(
    name: str, conversation: str, reference: Reference, templates: dict[str, ChatTemplate]
) -> None:
    messages = CONVERSATIONS[conversation]
    for options in (
        {},
        {"add_generation_prompt": False},
        {"tools": TOOLS},
        {"date_string": "24 Dec 2025", "enable_thinking": False},
        {"eos_token": "<other end>"},
    ):
        options = {"date_string": "26 Jul 2024", **options}
        assert ours(templates[name], messages, **options) == reference.render(name, messages, **options)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_continued_message_stays_open_as_in_transformers(
    name: str, reference: Reference, templates: dict[str, ChatTemplate]
) -> None:
    options = {"continue_final_message": True, "add_generation_prompt": False, "date_string": "26 Jul 2024"}
    for messages in (
        [user("a"), assistant("The answer is")],
        [user("a"), assistant(" The answer is \n")],
        [user("a"), assistant("same"), user("b"), assistant("same")],
        [user("The beginning of")],
        [user("a"), assistant("")],
        [user([{"type": "text", "text": "x"}, {"type": "text", "text": "y "}])],
        [user("a"), assistant("<think>hm</think> b ")],
    ):
        assert ours(templates[name], messages, **options) == reference.render(name, messages, **options)


def test_most_conversations_render(reference: Reference) -> None:
    """The comparison above compares prompts, not failures."""
    prompts = [
        reference.render(name, messages, date_string="")
        for name in TEMPLATES
        for messages in CONVERSATIONS.values()
    ]
    assert sum(prompt is not None for prompt in prompts) > 0.8 * len(prompts)


def test_what_templates_support_is_found_out(templates: dict[str, ChatTemplate]) -> None:
    tools = {name for name, template in templates.items() if template.supports_tools}
    assert tools == {"qwen2_5", "qwen3", "llama3_1", "mistral"}
    no_system = {name for name, template in templates.items() if not template.supports_system}
    assert no_system == {"gemma2"}


def test_the_clock_is_what_the_template_sees() -> None:
    template = ChatTemplate(
        {"default": TEMPLATES["llama3_1"]}, VARIABLES, clock=lambda: datetime(2031, 2, 3, 4, 5)
    )
    assert "Today Date: 03 Feb 2031\n" in template.render([user("a")])
