"""Where messages begin in a prompt, and which of them a token lies in."""

from __future__ import annotations

from typing import Any

from mlxd.chat.message_starts import MAX_UNFOUND, message_starts
from mlxd.engine.prefix_report import MAX_DECODED_TOKENS, find_message
from mlxd.engine.request import GenerationRequest


def say(role: str, content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def test_contents_are_found_in_their_order() -> None:
    text = "<s>sys<u>hi<a>hi<u>bye<a>"
    messages = [say("system", "sys"), say("user", "hi"), say("assistant", "hi"), say("user", "bye")]
    assert message_starts(text, messages) == (3, 9, 14, 19)


def test_trimmed_parts_calls_and_what_the_template_leaves_out() -> None:
    call = {"function": {"name": "look_up", "arguments": "{}"}}
    messages = [
        say("user", "  trimmed \n"),
        say("assistant", None, tool_calls=[call]),
        say("tool", [{"type": "image_url"}, {"type": "text", "text": "result"}]),
        say("assistant", "left out"),
        say("assistant", None),
        say("user", "end"),
    ]
    text = "<u>trimmed<a>look_up{}<t>result<u>end"
    at = text.index
    after_result = at("<u>end")
    assert message_starts(text, messages) == (
        at("trimmed"),
        at("look_up"),
        at("result"),
        after_result,
        after_result,
        at("end"),
    )


def test_the_search_for_what_is_left_out_has_an_end() -> None:
    messages = [*(say("user", f"no{n}") for n in range(MAX_UNFOUND)), say("user", "yes")]
    assert message_starts("<u>yes", messages[1:])[-1] == 3
    assert message_starts("<u>yes", messages)[-1] == 0


def decode(token_ids: Any, skip_special_tokens: bool) -> str:
    """Token n is n characters."""
    assert not skip_special_tokens
    return "".join("x" * n for n in token_ids)


def request(tokens: list[int], starts: tuple[int, ...]) -> GenerationRequest:
    return GenerationRequest(
        request_id="r",
        prompt_token_ids=tokens,
        max_tokens=1,
        message_starts=starts,
        num_prompt_characters=sum(tokens),
    )


def test_a_token_lies_in_the_message_that_began_last() -> None:
    tokens = [2, 3, 1, 4, 2, 2]  # begin at 0, 2, 5, 6, 10, 12
    asked = request(tokens, (2, 6, 12))
    assert [find_message(asked, n, decode) for n in range(6)] == [0, 0, 0, 1, 1, 2]
    assert find_message(request(tokens, ()), 3, decode) is None


def test_nobody_decodes_too_much() -> None:
    half = MAX_DECODED_TOKENS + 1
    asked = request([1] * (2 * half), (0, half))
    assert find_message(asked, half, decode) is None
    assert find_message(asked, half - 1, decode) == 0
    assert find_message(asked, half + 1, decode) == 1
