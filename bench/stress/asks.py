"""What clients ask: conversations that share beginnings, grow, branch and are changed in the middle.

It does not know how a request is sent. Everything follows from a random generator and the answers so far.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from bench.serve.workload import MISTAKES, WORDS
from bench.stress.answers import Answer

SCHEMA = {
    "type": "object",
    "properties": {"size": {"type": "integer", "minimum": 0, "maximum": 99}, "word": {"enum": ["a", "the"]}},
    "required": ["size", "word"],
    "additionalProperties": False,
}
TOOLS = ("look", "find")
SYSTEMS = tuple(" ".join(random.Random(length).choices(WORDS, k=length)) for length in (1, 4, 9, 20, 33))
MAX_CHARS = 240
"""of a conversation, so that prompt and answer always fit"""
APIS = ("chat", "chat", "completions", "messages", "messages")
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions", "messages": "/v1/messages"}


class Ending(StrEnum):
    """How a request is to end."""

    WHOLE = "whole"
    LEAVE = "leave"
    """the client drops the connection"""
    CANCEL = "cancel"
    """by its id, on another connection"""
    TIMEOUT = "timeout"
    MISTAKE = "mistake"
    """it is wrong, and refused"""


ENDINGS = (*[Ending.WHOLE] * 15, Ending.LEAVE, Ending.LEAVE, Ending.CANCEL, Ending.TIMEOUT, Ending.MISTAKE)


@dataclass(frozen=True, slots=True)
class Ask:
    """A request. `after`: pieces of the answer, or without a stream hundredths of a second, before it is
    ended; `is_greedy`: its answer can be told."""

    api: str
    body: dict[str, Any]
    ending: Ending
    after: int
    is_greedy: bool

    @property
    def path(self) -> str:
        return PATHS[self.api]

    @property
    def streamed(self) -> bool:
        return bool(self.body.get("stream"))

    def again(self) -> Ask:
        """The same, for its whole answer. A chat's is asked the other way, streamed or not."""
        return Ask(
            self.api,
            self._whole(streamed=self.streamed is (self.api == "messages")),
            Ending.WHOLE,
            0,
            self.is_greedy,
        )

    def with_logprobs(self) -> dict[str, Any]:
        """The body that asks for it once, not streamed, with the two best tokens of each place."""
        fields = {"logprobs": 2} if self.api == "completions" else {"logprobs": True, "top_logprobs": 2}
        return self._whole(streamed=False) | fields | {"n": 1}

    def _whole(self, *, streamed: bool) -> dict[str, Any]:
        body = {key: value for key, value in self.body.items() if key not in ("timeout", "stream_options")}
        return _streamed(self.api, body, streamed)


def _streamed(api: str, body: dict[str, Any], streamed: bool) -> dict[str, Any]:
    more = {"stream_options": {"include_usage": True}} if streamed and api != "messages" else {}
    return body | {"stream": streamed} | more


class Conversation:
    """`ask()` gives the next request, `learn()` takes what came of it."""

    def __init__(self, rng: random.Random, *, max_tokens: int, thinks: bool) -> None:
        self.rng = rng
        self.max_tokens = max_tokens
        self.thinks = thinks
        self.messages: list[dict[str, Any]] = []
        self.system = self.rng.choice(SYSTEMS)[: self.rng.choice((9, 200, 200))]
        self.num_turns = self.rng.randrange(1, 5)
        self.salt = self.rng.choice((None, None, None, "salt"))

    @property
    def is_over(self) -> bool:
        return not self.num_turns or sum(len(message["content"]) for message in self.messages) > MAX_CHARS

    def ask(self) -> Ask:
        rng = self.rng
        self.num_turns -= 1
        self.messages.append({"role": "user", "content": self._words(rng.randrange(1, 6))})
        api = rng.choice(APIS)
        greedy = rng.random() < 0.85
        body: dict[str, Any] = {
            "model": "default",
            "max_tokens": rng.randrange(1, self.max_tokens),
            "temperature": 0 if greedy else 1,
            **getattr(self, f"_{api}")(),
        }
        ending = rng.choice(ENDINGS)
        if api != "messages":
            body |= self._openai_fields(api)
            if ending is Ending.TIMEOUT:
                body["timeout"] = rng.uniform(0.01, 0.3)
        elif ending is Ending.TIMEOUT:
            ending = Ending.WHOLE
        body = _streamed(api, body, rng.random() < 0.6)
        if ending is Ending.MISTAKE:
            body |= rng.choice([wrong for wrong in MISTAKES if api != "messages" or "max_tokens" in wrong])
        return Ask(api, body, ending, rng.randrange(12), greedy)

    def learn(self, answer: Answer | None) -> None:
        """The answer joins the history: all of it, some or nothing, as a template may have it."""
        rng = self.rng
        choice = answer.choices.get(0) if answer is not None else None
        text = "" if choice is None else choice.text or str(choice.calls or choice.reasoning)
        self.messages.append(
            {"role": "assistant", "content": text[: rng.choice((200, 200, 200, 5, 0))] or "."}
        )
        if rng.random() < 0.1:
            changed = rng.choice(self.messages)
            changed["content"] = changed["content"][: rng.randrange(1, 20)] + rng.choice(WORDS)
        if rng.random() < 0.1:
            del self.messages[rng.randrange(len(self.messages)) // 2 * 2 :]

    def _words(self, count: int) -> str:
        return " ".join(self.rng.choices(WORDS[:40], k=count))

    def _chat(self) -> dict[str, Any]:
        history = [{"role": "system", "content": self.system}, *map(dict, self.messages)]
        thinking = {"thinking_token_budget": self.rng.randrange(20)} if self._has_budget() else {}
        return {"messages": history} | thinking | self._form("function", "parameters")

    def _messages(self) -> dict[str, Any]:
        thinking = {"type": "enabled", "budget_tokens": self.rng.randrange(1, 20)}
        form = self._form("", "input_schema") | ({"thinking": thinking} if self._has_budget() else {})
        return {"system": self.system, "messages": list(map(dict, self.messages))} | form

    def _has_budget(self) -> bool:
        return self.thinks and self.rng.random() < 0.8

    def _completions(self) -> dict[str, Any]:
        text = "".join(f"\n{message['content']}" for message in self.messages)
        fields: dict[str, Any] = {"prompt": f"{self.system}{text}"}
        match self.rng.randrange(12):
            case 0:
                fields |= {"guided_regex": "[a-f]{3,12}", "max_tokens": 20}
            case 1:
                fields |= {"echo": True, "logprobs": 2}
            case 2:
                fields["prompt_logprobs"] = 1
        return fields

    def _form(self, wrapper: str, schema_key: str) -> dict[str, Any]:
        """A forced call, an offered tool, an answer that fits a schema; mostly none of them."""
        kind = self.rng.randrange(8)
        if kind == 0:
            form = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA}}
            anthropic = {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}
            return {"max_tokens": 40} | ({"response_format": form} if wrapper else anthropic)
        if kind > 2:
            return {}
        tools = [{"name": name, schema_key: SCHEMA} for name in TOOLS]
        if wrapper:
            tools = [{"type": "function", "function": tool} for tool in tools]
        if kind == 2:
            return {"tools": tools}
        forced = "required" if wrapper else {"type": "any", "disable_parallel_tool_use": True}
        more = {"parallel_tool_calls": False} if wrapper else {}
        return {"tools": tools, "tool_choice": forced, "max_tokens": 70} | more

    def _openai_fields(self, api: str) -> dict[str, Any]:
        rng = self.rng
        fields: dict[str, Any] = {}
        if rng.random() < 0.15:
            fields["priority"] = rng.randrange(3)
        if rng.random() < 0.15:
            fields["n"] = 3
        if self.salt is not None:
            fields["cache_salt"] = self.salt
        if rng.random() < 0.1:
            fields["stop"] = rng.sample("aeiou ", k=2)
        if api == "chat" and rng.random() < 0.1:
            fields |= {"logprobs": True, "top_logprobs": 2}
        return fields
