"""Tools and thinking through a whole server: SDK, HTTP, engine, playback worker."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from bench.server import ServerProcess
from tests.e2e.sdk import connect, played, user

TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
ARGUMENTS = {"city": "Zürich 🙂"}
HERMES = (
    f"<tool_call>{json.dumps({'name': 'weather', 'arguments': ARGUMENTS}, ensure_ascii=False)}</tool_call>"
)
MISTRAL = f"[TOOL_CALLS]weather{json.dumps(ARGUMENTS)}"
CLOSING = "\n</think>\n\n"


@pytest.fixture(scope="module")
def thinking_server() -> Iterator[ServerProcess]:
    """It plays what a model would say that thinks as Qwen does and calls as Hermes does."""
    chat = {"reasoning_parser": "qwen3", "tool_call_parser": "hermes", "enable_auto_tool_choice": True}
    with ServerProcess({"worker": {"backend": "playback"}, "chat": chat}) as server:
        yield server


def ask(server: ServerProcess, text: str, **options: Any) -> Any:
    with connect(server) as client:
        return client.chat.completions.create(model="default", messages=user(played(text)), **options)


def ask_streaming(server: ServerProcess, text: str, **options: Any) -> Any:
    """The SDK's own accumulation of the stream, and what it says of usage."""
    with (
        connect(server) as client,
        client.chat.completions.stream(
            model="default",
            messages=user(played(text)),
            stream_options={"include_usage": True},
            **options,
        ) as stream,
    ):
        return stream.get_final_completion()


def told(completion: Any) -> tuple[Any, ...]:
    """What two answers to one request have in common."""
    [choice] = completion.choices
    message = choice.message
    calls = [(c.function.name, json.loads(c.function.arguments)) for c in message.tool_calls or ()]
    details = completion.usage.completion_tokens_details
    return (
        message.content or "",
        getattr(message, "reasoning", None) or "",
        calls,
        choice.finish_reason,
        completion.usage.completion_tokens,
        details.reasoning_tokens,
    )


@pytest.mark.parametrize(
    ("text", "content", "reasoning", "num_calls"),
    [
        ("Hello", "Hello", "", 0),
        ("<think>\nWell…\n</think>\n\nHello", "Hello", "Well…", 0),
        (f"<think>So.</think>\nLet me see.\n{HERMES}", "Let me see.", "So.", 1),
        (f"{HERMES}\n{HERMES}", "", "", 2),
        (f"<think>So. {HERMES}", "", "So.", 1),
        ("<think>cut", "", "cut", 0),
        ("<tool_call>", "<tool_call>", "", 0),
    ],
)
def test_streamed_equals_whole(
    thinking_server: ServerProcess, text: str, content: str, reasoning: str, num_calls: int
) -> None:
    whole = told(ask(thinking_server, text, tools=TOOLS))
    assert told(ask_streaming(thinking_server, text, tools=TOOLS)) == whole
    assert whole[:4] == (
        content,
        reasoning,
        [("weather", ARGUMENTS)] * num_calls,
        "tool_calls" if num_calls else "stop",
    )


def test_reasoning_tokens_are_those_between_the_tags(thinking_server: ServerProcess) -> None:
    # A token is a byte; the tag that ends the block might have been a thought until its last byte.
    num_reasoning_tokens = told(ask(thinking_server, "<think>12345</think>67"))[-1]
    assert num_reasoning_tokens == len("12345</think")
    assert told(ask(thinking_server, "1234567"))[-1] == 0


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_a_budget_is_enforced(thinking_server: ServerProcess, budget: int) -> None:
    """The model is made to close the block; playback then goes on at the place that it has come to."""
    text = "<think>" + "0123456789" * 5 + "</think>" + "abcdefghij" * 3
    # The token that opens the block is no thought, but only with it is it known that there is one.
    before = "<think>" + text[7 : 7 + budget]
    rest = text[len(before + CLOSING) :]
    whole = ask(thinking_server, text, extra_body={"thinking_token_budget": budget})
    expected = (rest, text[7 : 7 + budget])
    assert told(whole)[:2] == expected
    assert (
        told(ask_streaming(thinking_server, text, extra_body={"thinking_token_budget": budget}))[:2]
        == expected
    )
    usage = whole.usage
    assert usage.completion_tokens == len(text) + 1
    enough = ask(thinking_server, text, extra_body={"thinking_token_budget": 1000})
    assert told(enough)[:2] == ("abcdefghij" * 3, "0123456789" * 5)


def test_budgets_of_many_at_once(thinking_server: ServerProcess) -> None:
    def one(n: int) -> None:
        text = f"<think>{n:04}" + "0123456789" * 12 + "</think>done"
        budget = 4 + n % 50
        expected = text[len("<think>") :][:budget]
        options = {"extra_body": {"thinking_token_budget": budget}}
        answer = (ask if n % 2 else ask_streaming)(thinking_server, text, **options)
        assert told(answer)[:2] == (text[7 + budget + len(CLOSING) :], expected), n

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(64)))
    assert thinking_server.wait_idle()["integrity_errors"] == 0


def test_a_loop_with_a_tool(thinking_server: ServerProcess) -> None:
    with connect(thinking_server) as client:
        messages: list[Any] = user(played(f"<think>I need a tool.</think>{HERMES}"))
        first = client.chat.completions.create(model="default", messages=messages, tools=TOOLS)
        [call] = first.choices[0].message.tool_calls or []
        assert first.choices[0].finish_reason == "tool_calls"
        messages.append(first.choices[0].message)
        result = played("<think>Sunny.</think>It is sunny.")
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        second = client.chat.completions.create(model="default", messages=messages, tools=TOOLS)
        assert second.choices[0].message.content == "It is sunny."


@pytest.mark.parametrize("text", [HERMES, MISTRAL, f"One moment. {MISTRAL}"])
def test_without_a_word_of_configuration_the_first_marker_decides(playback: ServerProcess, text: str) -> None:
    whole = told(ask(playback, text, tools=TOOLS))
    assert whole[2] == [("weather", ARGUMENTS)] and whole[3] == "tool_calls"
    assert told(ask_streaming(playback, text, tools=TOOLS)) == whole
    # No tools, no calls.
    assert told(ask(playback, text))[:4] == (text, "", [], "stop")


@pytest.mark.parametrize(
    ("reasoning", "parser", "text"),
    [
        ("mistral", "mistral", f"[THINK]Hm.[/THINK]Look. {MISTRAL}"),
        ("deepseek_r1", "hermes", f"Hm.</think>Look. {HERMES}"),
        (
            "gpt_oss",
            "harmony",
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>Look."
            "<|end|><|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
            f"{json.dumps(ARGUMENTS)}<|call|>",
        ),
        (
            "gemma4",
            "gemma4",
            "<|channel>thought\nHm.<channel|>Look. "
            f'<|tool_call>call:weather{{city:<|"|>{ARGUMENTS["city"]}<|"|>}}<tool_call|>',
        ),
        (
            "glm4",
            "glm47",
            "<think>Hm.</think>Look. <tool_call>weather\n<arg_key>city</arg_key>"
            f"<arg_value>{ARGUMENTS['city']}</arg_value></tool_call>",
        ),
        ("auto", "auto", f"<think>Hm.</think>Look. {MISTRAL}"),
    ],
)
def test_families(reasoning: str, parser: str, text: str) -> None:
    chat = {"reasoning_parser": reasoning, "tool_call_parser": parser}
    with ExitStack() as stack:
        config = {"worker": {"backend": "playback"}, "chat": chat}
        server = stack.enter_context(ServerProcess(config))
        whole = told(ask(server, text, tools=TOOLS))
        assert whole[:4] == ("Look.", "Hm.", [("weather", ARGUMENTS)], "tool_calls")
        assert told(ask_streaming(server, text, tools=TOOLS)) == whole


def test_a_prompt_that_opens_the_block(start: Callable[[dict[str, Any]], ServerProcess]) -> None:
    """A template as DeepSeek's and newer Qwens': found out without configuration."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    server = start({"worker": {"backend": "playback"}, "model": {"chat_template": template}})
    assert told(ask(server, "Hm.\n</think>\n\nHello"))[:2] == ("Hello", "Hm.")
    assert told(ask_streaming(server, "Hm.\n</think>\n\nHello"))[:2] == ("Hello", "Hm.")
    assert told(ask(server, "cut"))[:2] == told(ask_streaming(server, "cut"))[:2] == ("", "cut")
    quick = {"extra_body": {"enable_thinking": False}}
    assert told(ask(server, "Hello", **quick))[:2] == ("Hello", "")


def test_a_call_that_is_asked_for_is_played_as_it_stands(playback: ServerProcess) -> None:
    call = '<tool_call>{"name":"weather","arguments":{"city":"Bern"}}</tool_call>'
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    with connect(playback) as client:
        answer = client.chat.completions.create(
            model="default",
            messages=user(played(call)),
            tools=[tool],
            tool_choice={"type": "function", "function": {"name": "weather"}},
        )
    [made] = answer.choices[0].message.tool_calls or []
    assert made.function.arguments == '{"city":"Bern"}'


def test_the_next_turn_computes_what_is_new(start: Callable[[dict[str, Any]], ServerProcess]) -> None:
    """Qwen3's template leaves earlier thinking out. Streamed and not, text and a call."""
    template = Path(__file__).parents[1] / "unit" / "chat" / "templates" / "qwen3.jinja"
    server = start({"worker": {"backend": "playback"}, "model": {"chat_template": str(template)}})
    messages: list[Any] = []
    with connect(server) as client:
        for number in range(4):
            answer = HERMES if number % 2 else "seen again " * 30
            asked: dict[str, Any] = {"role": "user"}
            if number == 2:
                asked = {"role": "tool", "tool_call_id": messages[-1]["tool_calls"][0]["id"]}
            asked["content"] = played(f"<think>\n{'seen once ' * 30}\n</think>\n\n{answer}")
            messages.append(asked)
            options: dict[str, Any] = {"model": "default", "messages": messages, "tools": TOOLS}
            if number % 2:
                completion: Any = client.chat.completions.create(**options)
            else:
                include_usage: Any = {"include_usage": True}
                with client.chat.completions.stream(**options, stream_options=include_usage) as stream:
                    completion = stream.get_final_completion()
            usage, message = completion.usage, completion.choices[0].message
            if number:  # else the tools are new, too
                computed = usage.prompt_tokens - usage.prompt_tokens_details.cached_tokens
                assert computed < len(asked["content"].encode()) + 60
            messages.append({"role": "assistant", "content": message.content or ""})
            if message.tool_calls:
                messages[-1]["tool_calls"] = [call.model_dump() for call in message.tool_calls]
            server.wait_until(
                lambda number=number: server.status()["cache"]["background_prefills"] == number + 1,
                10,
                "the next turn",
            )
    status = server.wait_idle()
    assert status["cache"]["background_tokens"] > 0 and status["integrity_errors"] == 0
    assert status["total_requests_processed"] == 4
