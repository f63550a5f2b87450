"""The next turn of a conversation, computed before it is asked for: its prompt up to what the user will say.

Templates show the model its earlier answers in other words than it gave them: without their thinking, calls
written anew. So what was computed for an answer is of no use to the turn after it, which would compute the
answer again as the template has it. Here that is done while nothing else waits.

It does not know dialects or blocks. Whether a client sends the thinking back with the results of calls is a
guess: as it did before in this conversation or, at first, as clients of its dialect do.
"""

from __future__ import annotations

import asyncio
import logging
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass
from typing import Any

from mlxd.api.caller import Caller, joined_salt
from mlxd.api.prompt import ChatPrompt, Conversation
from mlxd.api.served_model import ServedModel
from mlxd.api.services import of_caller
from mlxd.chat.answer import AnswerRecord
from mlxd.chat.format import ChatFormat
from mlxd.engine.engine import Engine
from mlxd.engine.request import GenerationRequest
from mlxd.errors import MlxdError, NotReadyError

logger = logging.getLogger(__name__)

MAX_PENDING = 32
MAX_PENDING_CHARACTERS = 8 * 1024 * 1024
"""Conversations that wait for their turn, and their prompts' characters; the oldest are dropped."""
MAX_TOKENS = 8192
"""computed for one conversation; of more, the first"""
MAX_SECONDS = 60.0
"""What could not be computed by then is dropped: its next turn has come, or may never."""

_FOLLOW_UPS = ("Yes", "no")
"""What may come next: the next turn's prompt begins as both of these have it."""


@dataclass(frozen=True, slots=True)
class _AnsweredTurn:
    """A conversation, and its last message. `num_characters` are those of the prompt."""

    conversation: Conversation
    answer: dict[str, Any]
    caller: Caller
    cache_salt: str
    num_characters: int


class NextTurns:
    """Conversations whose next turn is to be computed, one after another, the one that was answered first
    first. Everything but rendering runs on the event loop."""

    def __init__(self, engine: Engine, model: ServedModel) -> None:
        self._engine = engine
        self._model = model
        self._pending: deque[_AnsweredTurn] = deque()
        self._num_characters = 0
        self._num_asked = 0
        self._task: asyncio.Task[None] | None = None

    def record(self, prompt: ChatPrompt, num_answers: int) -> AnswerRecord | None:
        """What `add` wants to know of the answer to `prompt`; None where there is no need to ask it."""
        answer = prompt.answer
        if (
            answer.is_plain
            or prompt.conversation is None
            or num_answers > 1
            or not self._engine.shares_prefixes
        ):
            return None
        return AnswerRecord(thinks=answer.thinks)

    def add(
        self,
        prompt: ChatPrompt,
        answer: dict[str, Any],
        caller: Caller,
        cache_salt: str,
        *,
        returns_thinking: bool = False,
    ) -> None:
        """Compute the turn after `prompt` and `answer`, which is as the client will send it back and the
        template see it, when there is time. `returns_thinking`: clients of this dialect send it back."""
        is_empty = not answer.get("content") and not answer.get("tool_calls")
        if is_empty or prompt.conversation is None or len(prompt.text) > MAX_PENDING_CHARACTERS:
            return
        earlier = [message for message in prompt.conversation.messages if message["role"] == "assistant"]
        if earlier:
            returns_thinking = any("reasoning_content" in message for message in earlier)
        if not returns_thinking:
            answer = {name: value for name, value in answer.items() if name != "reasoning_content"}
        turn = _AnsweredTurn(prompt.conversation, answer, caller, cache_salt, len(prompt.text))
        self._pending.append(turn)
        self._num_characters += turn.num_characters
        while len(self._pending) > MAX_PENDING or self._num_characters > MAX_PENDING_CHARACTERS:
            self._take()
            self._engine.stats.num_background_dropped += 1
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        while self._pending:
            try:
                await self._compute(self._take())
            except NotReadyError:  # what would be gone on from is lost, or nobody will ask again
                self._pending.clear()
                self._num_characters = 0
            except MlxdError as error:
                logger.debug("a next turn was not computed: %s", error)
            except Exception:
                logger.exception("bug in computing a next turn")

    def _take(self) -> _AnsweredTurn:
        turn = self._pending.popleft()
        self._num_characters -= turn.num_characters
        return turn

    async def _compute(self, turn: _AnsweredTurn) -> None:
        engine = self._engine
        engine.check_ready()
        [token_ids] = await self._model.encode(
            [
                await asyncio.to_thread(
                    shared_prompt, await self._model.chat_format(), turn.conversation, turn.answer
                )
            ],
            add_special_tokens=turn.conversation.add_special_tokens,
        )
        engine.check_ready()
        assert engine.info is not None
        salt = joined_salt(turn.caller.cache_salt, turn.cache_salt)
        num_cached = engine.num_cached_tokens(token_ids, salt)
        token_ids = token_ids[: num_cached + MAX_TOKENS]
        if len(token_ids) - num_cached < engine.info.block_size:
            return
        self._num_asked += 1
        request = GenerationRequest(
            request_id=f"next-turn.{self._num_asked}",
            prompt_token_ids=token_ids,
            max_tokens=0,
            cache_salt=turn.cache_salt,
            timeout_seconds=MAX_SECONDS,
            background=True,
        )
        await engine.submit([of_caller(request, turn.caller)]).drain()


def shared_prompt(chat_format: ChatFormat, conversation: Conversation, answer: dict[str, Any]) -> str:
    """What the prompts of all turns that may follow begin with: results where the answer has calls, else
    something that the user says. Raises what ChatFormat.render does."""
    first, second = (
        chat_format.render(
            [*conversation.messages, answer, *_follow_up(answer, words, is_named=words == _FOLLOW_UPS[0])],
            tools=conversation.tools,
            tool_choice=conversation.tool_choice,
            kwargs=conversation.kwargs,
        ).text
        for words in _FOLLOW_UPS
    )
    return first[: _num_common(first, second)]


def _follow_up(answer: dict[str, Any], words: str, *, is_named: bool) -> list[dict[str, Any]]:
    """`is_named`: results say whose they are. Some clients send that, some do not."""
    results: list[dict[str, Any]] = []
    for call in answer.get("tool_calls", ()):
        result = {"role": "tool", "tool_call_id": call["id"], "content": words}
        results.append(result | {"name": call["function"]["name"]} if is_named else result)
    return results or [{"role": "user", "content": words}]


def _num_common(first: str, second: str) -> int:
    """Characters that both begin with."""
    return bisect_left(
        range(min(len(first), len(second))), True, key=lambda n: first[: n + 1] != second[: n + 1]
    )
