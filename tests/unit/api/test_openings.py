"""What a conversation begins with before its user says something, which others may begin with too."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from mlxd.api.prompt import MAX_JOINED_TOKENS, _num_common
from tests.unit.api.fakes import FILES, TOKENIZER, FakeEngine, client, make_app, says
from tests.unit.api.test_next_turn import CHAT, MESSAGES, TEMPLATES, TOOLS

USER = {"role": "user", "content": "Question?"}
TURNS = [USER, {"role": "assistant", "content": "Question?"}, {"role": "user", "content": "More."}]


def submitted(path: str, body: dict[str, Any], *, keeps_states: bool = True) -> tuple[str, int]:
    """The prompt's opening, as the engine is told of it, and how many tokens that is."""
    source = (TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8")
    engine = FakeEngine(says("Yes."), files=replace(FILES, chat_templates={"default": source}))
    engine.keeps_states = keeps_states

    async def main() -> None:
        async with client(make_app(engine)) as http:
            fields = {"model": "default", "max_tokens": 9}
            response = await http.post(path, json=fields | body)
            assert response.status_code == 200, response.text

    asyncio.run(main())
    [request] = engine.submitted
    opening = request.prompt_token_ids[: request.num_opening_tokens]
    return TOKENIZER.decode(opening, False), request.num_opening_tokens


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
@pytest.mark.parametrize("messages", [[USER], TURNS])
def test_it_ends_where_the_user_begins(path: str, messages: list[dict[str, Any]]) -> None:
    system: dict[str, Any] = {"system": "Be brief.", "messages": messages}
    if path == CHAT:
        system = {"messages": [{"role": "system", "content": "Be brief."}, *messages]}
    start = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    assert submitted(path, system)[0] == start
    with_tools, _ = submitted(path, system | {"tools": TOOLS[path]})
    assert with_tools.startswith("<|im_start|>system\nBe brief.\n\n# Tools") and "weather" in with_tools
    assert with_tools.endswith("<|im_start|>user\n")


def test_it_is_what_is_before_the_user_where_there_is_no_system_prompt() -> None:
    assert submitted(CHAT, {"messages": TURNS})[0] == "<|im_start|>user\n"


def test_nobody_looks_for_it_without_need() -> None:
    assert submitted(CHAT, {"messages": TURNS}, keeps_states=False)[1] == 0
    only = [{"role": "assistant", "content": "Hello."}]
    assert submitted(CHAT, {"messages": only})[1] == 0


def test_a_token_may_reach_over_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the text goes on, its last tokens may be others."""

    def encode_batch(self: object, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        whole, *opening = encode(self, texts, add_special_tokens)
        return [whole, *([*ids[:-2], 3, 4, 5] for ids in opening)]

    encode = type(TOKENIZER).encode_batch
    monkeypatch.setattr(type(TOKENIZER), "encode_batch", encode_batch)
    opening, _ = submitted(CHAT, {"messages": [{"role": "system", "content": "Be brief."}, USER]})
    whole = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    assert whole.startswith(opening) and len(whole) - 10 < len(opening) < len(whole)


def test_a_long_opening_is_compared_once() -> None:
    """Else its length would count as often as tokens at its end are others."""

    class Tokens(list[int]):
        num_slices = 0

        def __getitem__(self, key: Any) -> Any:
            self.num_slices += isinstance(key, slice)
            return super().__getitem__(key)

    whole, opening = Tokens(range(300)), list(range(200))
    assert _num_common(whole, opening) == 200
    for num_others in range(1, MAX_JOINED_TOKENS + 1):
        whole.num_slices = 0
        assert _num_common(whole, opening[:-num_others] + [999] * num_others) == 200 - num_others
        assert whole.num_slices == 1
    assert _num_common(whole, [999, *opening[1:]]) == _num_common(whole, []) == 0
    assert _num_common(Tokens(range(3)), opening) == 0
