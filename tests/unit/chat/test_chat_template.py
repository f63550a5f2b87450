"""Chat templates: refusals, failures, the sandbox, names. Prompts are compared in …_reference.py."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mlxd.chat import template as template_module
from mlxd.chat.template import ChatTemplate, no_chat_template
from mlxd.errors import ConfigError, InvalidRequestError
from mlxd.text.model_files import ModelFiles

USER = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def make(text: str, **named: str) -> ChatTemplate:
    return ChatTemplate({"default": text, **named}, {"bos_token": "<s>"})


def refusal(
    template: ChatTemplate, messages: list[dict[str, Any]] = USER, **options: Any
) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as error:
        template.render(messages, **options)
    return error.value


def test_a_refusal_carries_the_templates_own_words() -> None:
    error = refusal(make("{{ raise_exception('Roles must alternate') }}"))
    assert str(error) == "the chat template refused: Roles must alternate"
    assert error.param == "messages"


@pytest.mark.parametrize(
    "text",
    [
        "{{ messages[0].content + 1 }}",
        "{{ messages[0].missing.field }}",
        "{{ 1 / 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for i in range(10000000) %}{% endfor %}",
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'a': 1}) }}",
        "{{ namespace(_x=1) }}",
        "{% set ns = namespace(a=1) %}{% set ns._x = 2 %}",
        "{{ dict.__init__.__globals__ }}",
    ],
)
def test_what_fails_or_leaves_the_sandbox_is_the_requests_error(text: str) -> None:
    assert "the chat template failed on this conversation" in str(refusal(make(text)))


def test_a_prompt_has_a_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_module, "MAX_PROMPT_CHARACTERS", 1000)
    template = make("{% for i in range(n) %}{{ 'ten chars ' }}{% endfor %}")
    assert len(template.render(USER, n=100)) == 1000
    assert "more than 1000 characters" in str(refusal(template, n=101))


def test_syntax_errors_are_the_operators() -> None:
    with pytest.raises(ConfigError, match=r"chat template 'default', line 2: .*endif"):
        make("{% if x %}\n{% endfor %}")


def test_globals_and_filters() -> None:
    text = "{% set ns = namespace(self=1, a=2) %}{% set ns.a = 3 %}{{ ns.self }}{{ ns.a }}{{ dict(a=1).a }}"
    assert make(text + "{{ dict.fromkeys(['x'], 7).x }}").render(USER) == "1317"
    value = {"b": "<é>", "a": [1]}
    assert make("{{ v | tojson }}").render(USER, v=value) == json.dumps(value, ensure_ascii=False)
    indented = make("{{ v | tojson(indent=2, sort_keys=true, ensure_ascii=true) }}").render(USER, v=value)
    assert indented == json.dumps(value, indent=2, sort_keys=True)


def test_blocks_take_their_line_with_them() -> None:
    assert make("a\n  {% if true %}\nb\n  {% endif %}\nc").render(USER) == "a\nb\nc"


def test_variables() -> None:
    text = (
        "{{ bos_token }}|{{ documents is none }}|{{ tools is none }}|{{ add_generation_prompt }}|{{ mine }}"
    )
    template = make(text)
    assert template.render(USER) == "<s>|True|True|True|"
    assert template.render(USER, tools=[]) == "<s>|True|True|True|"
    expected = "<b>|False|False|False|m"
    options = {"bos_token": "<b>", "documents": [], "mine": "m", "add_generation_prompt": False}
    assert template.render(USER, tools=[TOOL], **options) == expected
    names: dict[str, Any] = {"self": 1, "name": "n", "template": "t"}
    assert make("{{ name }}{{ template }}").render(USER, **names) == "nt"
    with pytest.raises(InvalidRequestError, match="messages cannot be set here"):
        template.render(USER, messages=[])


def test_a_template_for_tools_is_used_with_tools() -> None:
    template = make("plain", tool_use="{{ tools[0].function.name }}!")
    assert template.supports_tools
    assert template.render(USER) == template.render(USER, tools=[]) == "plain"
    assert template.render(USER, tools=[TOOL]) == "f!"
    assert ChatTemplate({"rag": "only"}, {}).render(USER) == "only"


def test_no_messages() -> None:
    assert refusal(make(""), []).param == "messages"


def test_continuing() -> None:
    text = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    parts = "{% for p in messages[0].content %}{{ p.text }}{% endfor %}"
    both = refusal(make(text), continue_final_message=True)
    assert "exclude each other" in str(both)
    options = {"continue_final_message": True, "add_generation_prompt": False}
    assert make(text).render(USER, **options) == "[hi"
    for template, messages in (
        (make(text), [{"role": "assistant", "content": None}]),
        (make(parts), [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        (make("{{ messages[0].role }}"), USER),
        (make("{{ messages[0].content | upper }}"), USER),
        (make(text), [{"role": "assistant", "content": "hi", "tool_calls": [CALL]}]),
    ):
        assert refusal(template, messages, **options).param == "continue_final_message"


def test_a_template_that_knows_developers_gets_them() -> None:
    developer = [{"role": "developer", "content": "x"}, *USER]
    assert make("{{ messages[0].role }}").render(developer) == "system"
    assert make("{{ messages[0].role }}{# developer #}").render(developer) == "developer"


def test_arguments_are_text_for_templates_that_join_them() -> None:
    calls = "{% for m in messages %}{% for c in m.tool_calls or [] %}CALL{% endfor %}{% endfor %}"
    text = calls.replace("CALL", "{{ 'a:' + c.function.arguments }}")
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    assert make(text).render([*USER, {"role": "assistant", "tool_calls": [call]}]) == 'a:{"a":1}'
    dumped = make(calls.replace("CALL", "{{ c.function.arguments | tojson }}"))
    assert dumped.render([*USER, {"role": "assistant", "tool_calls": [call]}]) == '{"a": 1}'


def test_from_files(tmp_path: Path) -> None:
    class Tokens:
        bos_token = "<s>"
        eos_token = None

    assert ChatTemplate.from_files(ModelFiles.read(tmp_path), Tokens()) is None
    assert "chat template" in str(no_chat_template())
    config = {
        "chat_template": "{{ bos_token }}{{ eos_token }}{{ pad_token }}",
        "pad_token": "<pad>",
        "eos_token": "<e>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate.from_files(ModelFiles.read(tmp_path), Tokens())
    assert template is not None
    assert template.render(USER) == "<s><e><pad>"


def test_the_time_is_the_clocks() -> None:
    assert re.fullmatch(r"\d{4}", make("{{ strftime_now('%Y') }}").render(USER))
