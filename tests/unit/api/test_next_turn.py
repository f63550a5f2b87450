"""What is computed once an answer is out: that with which the prompt of the next turn will begin."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from mlxd.api import next_turn
from mlxd.chat.answer import AnswerRecord
from mlxd.chat.types import ReasoningDelta, TextDelta, ToolCallDelta, ToolCallStart
from mlxd.engine.request import FinishReason, GenerationRequest, RequestOutput
from mlxd.errors import NotReadyError, WorkerError
from tests.unit.api.fakes import FILES, TOKENIZER, FakeEngine, Wire, client, fails, make_app, says, until
from tests.unit.api.test_mcp import SUMS, Scene, called

TEMPLATES = Path(__file__).parents[1] / "chat" / "templates"
CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = {
    CHAT: [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}],
    MESSAGES: [{"name": "weather", "input_schema": SCHEMA}],
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city":"Paris"}}\n</tool_call>'
THOUGHT = "<think>\nHm, let me see.\n</think>\n\n"
QUESTION = {"role": "user", "content": "Question?"}


class Talk:
    """A conversation with an app whose model answers `text`; `ahead` are the prompts computed ahead."""

    def __init__(
        self,
        text: str,
        path: str = CHAT,
        *,
        template: str = "qwen3",
        config: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
        finish: FinishReason = FinishReason.STOP,
        **fields: Any,
    ) -> None:
        source = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
        self.text, self.finish = text, finish
        self.engine = FakeEngine(self._script, files=replace(FILES, chat_templates={"default": source}))
        self.engine.shares_prefixes = True
        self.app = make_app(self.engine, config)
        self.path, self.headers = path, headers
        self.fields = ({"model": "default", "max_tokens": 500} if path == MESSAGES else {}) | fields
        self.messages: list[Any] = [QUESTION]
        self.returns_thinking = False
        """also over OpenAI's API"""

    def _script(self, request: GenerationRequest) -> Iterable[RequestOutput]:
        return says(self.text, finish=self.finish)(request)

    @property
    def ahead(self) -> list[GenerationRequest]:
        return [request for request in self.engine.submitted if request.background]

    async def ask(self, http: httpx.AsyncClient) -> dict[str, Any]:
        """The next turn; its answer as a client sends it back joins the messages."""
        body = {"messages": self.messages, **self.fields}
        response = await http.post(self.path, json=body, headers=self.headers)
        assert response.status_code == 200, response.text
        if self.fields.get(
            "stream"
        ):  # what a stream says is what the whole answer says: other tests see to it
            return {}
        message: dict[str, Any] = response.json()
        if self.path == MESSAGES:
            self.messages.append({"role": "assistant", "content": message["content"]})
        else:
            answer = message["choices"][0]["message"]
            if not self.returns_thinking:
                answer = {name: value for name, value in answer.items() if "reasoning" not in name}
            self.messages.append(answer)
        return message

    def once(self, num_ahead: int = 1) -> list[str]:
        """Ask, and wait until so many prompts were computed ahead; their texts."""

        async def main() -> None:
            async with client(self.app) as http:
                await self.ask(http)
                await until(lambda: len(self.ahead) >= num_ahead)
                for _ in range(50):  # for what should not come
                    await asyncio.sleep(0)
                await settled(self)

        asyncio.run(main())
        assert len(self.ahead) == num_ahead
        return [TOKENIZER.decode(request.prompt_token_ids, False) for request in self.ahead]


async def settled(talk: Talk) -> None:
    task = talk.app._services.next_turns._task  # type: ignore[union-attr]
    if task is not None:
        await task


def follow(path: str, message: dict[str, Any], words: str) -> list[Any]:
    """What a client says to an answer: its tools' results or something else."""
    if path == MESSAGES:
        uses = [block["id"] for block in message["content"] if block["type"] == "tool_use"]
        results = [{"type": "tool_result", "tool_use_id": use, "content": words} for use in uses]
        return [{"role": "user", "content": results or words}]
    calls = message["choices"][0]["message"].get("tool_calls", ())
    results = [{"role": "tool", "tool_call_id": call["id"], "content": words} for call in calls]
    return results or [{"role": "user", "content": words}]


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
@pytest.mark.parametrize("template", ["qwen3", "deepseek_r1"])
@pytest.mark.parametrize(
    "answer",
    ["The answer.", " Two\nlines. ", f"Look: {CALL}", CALL, f"{CALL}\n{CALL}"],
    ids=["text", "space", "text and call", "call", "calls"],
)
def test_the_prompts_of_all_that_may_follow_begin_with_it(path: str, template: str, answer: str) -> None:
    """By the next request's own prompt, whatever it says; and no prompt that may be has more in common."""
    thought = THOUGHT if template == "qwen3" else THOUGHT.removeprefix("<think>\n")
    tools = TOOLS[path] if CALL in answer else None
    talk = Talk(thought + answer, path, template=template, tools=tools)

    async def main() -> None:
        async with client(talk.app) as http:
            message = await talk.ask(http)
            await settled(talk)
            [ahead] = talk.ahead
            before = list(talk.messages)
            for words in ("Yes", "42 is it", "…"):
                talk.messages = [*before, *follow(path, message, words)]
                await talk.ask(http)
                await settled(talk)
                prompts = [r.prompt_token_ids for r in talk.engine.submitted if not r.background]
                size = len(ahead.prompt_token_ids)
                assert prompts[-1][:size] == ahead.prompt_token_ids
                assert TOKENIZER.decode(prompts[-1][size:], False).startswith(words)
            assert "Hm, let me" not in TOKENIZER.decode(ahead.prompt_token_ids, False) or (
                path == MESSAGES and tools
            )

    asyncio.run(main())


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
@pytest.mark.parametrize("answer", [f"{THOUGHT}The answer.", f"{THOUGHT}Look: {CALL}\n{CALL}", CALL])
def test_streamed_equals_whole(path: str, answer: str) -> None:
    whole = Talk(answer, path, tools=TOOLS[path]).once()
    assert Talk(answer, path, tools=TOOLS[path], stream=True).once() == whole


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_thinking_goes_back_where_the_client_has_sent_it_before(path: str) -> None:
    """At first Anthropic's clients are taken to send it, OpenAI's not; it matters within a loop of tools."""
    talk = Talk(f"{THOUGHT}Look: {CALL}", path, tools=TOOLS[path])

    async def main() -> None:
        async with client(talk.app) as http:
            talk.messages += follow(path, await talk.ask(http), "Rain.")
            await settled(talk)
            talk.returns_thinking = True
            talk.messages += follow(path, await talk.ask(http), "Rain.")
            await settled(talk)
            if path == MESSAGES:
                for turn in talk.messages[1::2]:
                    turn["content"] = [block for block in turn["content"] if block["type"] != "thinking"]
            await talk.ask(http)
            await settled(talk)

    asyncio.run(main())
    shown = [TOKENIZER.decode(r.prompt_token_ids, False).count("Hm, let me see.") for r in talk.ahead]
    assert shown == ([1, 2, 0] if path == MESSAGES else [0, 0, 2])


def test_it_is_the_callers_and_has_the_requests_salt() -> None:
    keys = [{"name": "alice", "key": "ka", "cache_salt": "hers"}, {"name": "bob", "key": "kb"}]
    config = {"limits": {"api_keys": keys}}
    for path in (CHAT, MESSAGES):
        talk = Talk(f"{THOUGHT}Yes.", path, config=config, headers={"x-api-key": "ka"}, cache_salt="and this")
        talk.once()
        real, ahead = talk.engine.submitted
        assert (ahead.client, ahead.cache_salt) == ("alice", "4 hersand this")
        assert (real.client, real.cache_salt) == (ahead.client, ahead.cache_salt)
        assert ahead.background and ahead.max_tokens == 0 and not real.background


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("Only text.", {"template": "qwen2_5"}),
        ("Only text.", {"template": "qwen2_5", "tools": TOOLS[CHAT]}),
        (f"{THOUGHT}Yes.", {"n": 2}),
        (f"{THOUGHT}Yes.", {"add_generation_prompt": False}),
        (
            f"{THOUGHT}Yes.",
            {"messages": [QUESTION, {"role": "assistant", "content": "So"}], "continue_final_message": True},
        ),
        ("<think>\nnothing but thinking", {}),
    ],
)
def test_where_nothing_would_be_gained_nothing_is_computed(text: str, fields: dict[str, Any]) -> None:
    Talk(text, **fields).once(0)


def test_answers_that_failed_have_no_next_turn() -> None:
    talk = Talk("")
    talk.engine.script = fails(WorkerError("gone"), after=f"{THOUGHT}Yes and")

    async def main() -> None:
        async with client(talk.app) as http:
            for stream in (False, True):
                await http.post(CHAT, json={"messages": [QUESTION], "stream": stream})
        talk.engine.script, talk.engine.held = talk._script, True
        for stream in (False, True):  # the client leaves
            talk.text = f"{THOUGHT}Yes."
            wire = Wire(
                talk.app, "POST", CHAT, json.dumps({"messages": [QUESTION], "stream": stream}).encode()
            )
            await until(lambda: talk.engine.num_running == 1)
            wire.disconnect()
            await asyncio.wait([wire.task])
        await settled(talk)

    asyncio.run(main())
    assert talk.ahead == []


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_an_empty_block_of_thinking_is_left_out_too(path: str) -> None:
    switch = {"enable_thinking": False} if path == CHAT else {"thinking": {"type": "disabled"}}
    talk = Talk("Yes.", path, **switch)
    [text] = talk.once()
    assert "<think>" in TOKENIZER.decode(talk.engine.submitted[0].prompt_token_ids, False)
    assert "<think>" not in text and text.endswith("assistant\nYes.<|im_end|>\n<|im_start|>user\n")


def test_an_answer_that_was_cut_is_history_too() -> None:
    [text] = Talk(f"{THOUGHT}Yes and", finish=FinishReason.LENGTH).once()
    assert text.endswith("assistant\nYes and<|im_end|>\n<|im_start|>user\n")


def test_it_can_be_switched_off() -> None:
    talk = Talk(f"{THOUGHT}Yes.", config={"cache": {"prefill_answers": False}})
    assert talk.app._services.next_turns is None
    talk.engine.shares_prefixes = False
    without = Talk(f"{THOUGHT}Yes.")
    without.engine.shares_prefixes = False
    without.once(0)


def test_what_is_cached_already_is_left_alone() -> None:
    talk = Talk(f"{THOUGHT}Yes.")
    [text] = talk.once()
    again = Talk(f"{THOUGHT}Yes.")
    again.engine.submitted = [replace_prompt(talk.ahead[0])]
    again.once(0)
    assert text.endswith("Yes.<|im_end|>\n<|im_start|>user\n")


def replace_prompt(request: GenerationRequest) -> GenerationRequest:
    """As if somebody had asked for it."""
    return GenerationRequest(request_id="r", prompt_token_ids=request.prompt_token_ids, max_tokens=1)


def test_of_a_long_one_the_first_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(next_turn, "MAX_TOKENS", 20)
    talk = Talk(f"{THOUGHT}{'Many words. ' * 20}")
    talk.once()
    real, ahead = talk.engine.submitted
    assert len(ahead.prompt_token_ids) == len(real.prompt_token_ids) + 20


def test_the_oldest_make_room_and_a_worker_that_is_gone_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(next_turn, "MAX_PENDING", 2)
    talk = Talk(f"{THOUGHT}Yes.")

    async def main() -> None:
        async with client(talk.app) as http:
            await talk.ask(http)
            await until(lambda: len(talk.ahead) == 1)
            await settled(talk)
            turns = talk.app._services.next_turns
            assert turns is not None
            turns._task = asyncio.get_running_loop().create_task(asyncio.sleep(3600))  # busy
            for _ in range(4):
                await talk.ask(http)
            assert len(turns._pending) == 2 and talk.engine.stats.num_background_dropped == 2
            turns.stop()
            await asyncio.wait([turns._task])
            monkeypatch.setattr(next_turn, "MAX_PENDING_CHARACTERS", 10)
            await talk.ask(http)  # larger than all that may wait
            assert len(turns._pending) == 2
            talk.engine.not_ready = NotReadyError("gone")
            turns._task = asyncio.get_running_loop().create_task(turns._run())
            await turns._task
            assert not turns._pending and turns._num_characters == 0

    asyncio.run(main())
    assert len(talk.ahead) == 1


def test_a_template_that_will_not_have_it_is_no_ones_trouble(caplog: pytest.LogCaptureFixture) -> None:
    talk = Talk(f"{THOUGHT}Yes.")
    source = "{% if messages | length > 1 %}{{ raise_exception('one question') }}{% endif %}<think></think>"
    talk.engine.files = replace(FILES, chat_templates={"default": source})
    talk.once(0)
    assert "bug" not in caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_tools_that_the_server_ran_are_not_in_the_clients_history(stream: bool) -> None:
    scene = Scene(called("sums__add", a=1), "The sum is 1.")
    scene.engine.shares_prefixes = True

    async def use(app: Any) -> None:
        async with client(app) as http:
            body = {"messages": [QUESTION], "tools": [SUMS], "stream": stream}
            assert (await http.post(CHAT, json=body)).status_code == 200
            await until(lambda: scene.engine.submitted[-1].background)
            await app._services.next_turns._task

    scene.run(use)
    assert scene.prompts()[-1].endswith("Question?<|assistant|>The sum is 1.<|user|>")


def test_a_record_joins_pieces() -> None:
    record = AnswerRecord(thinks=False)
    record.add([TextDelta("a"), TextDelta("b")])
    assert record.events() == [TextDelta("ab")] and not record.may_be_reworded
    record.add([ReasoningDelta("c"), ReasoningDelta("d"), TextDelta("e"), ToolCallStart(0, "i", "f")])
    record.add([ToolCallDelta(0, "{"), ToolCallDelta(0, "}"), ToolCallStart(1, "j", "g")])
    record.add([ToolCallDelta(1, "{}")])
    assert record.may_be_reworded
    assert record.events() == [
        TextDelta("ab"),
        ReasoningDelta("cd"),
        TextDelta("e"),
        ToolCallStart(0, "i", "f"),
        ToolCallDelta(0, "{}"),
        ToolCallStart(1, "j", "g"),
        ToolCallDelta(1, "{}"),
    ]
    assert AnswerRecord(thinks=True).may_be_reworded
