"""How much of a sequence is thinking, token by token, and when it has been enough.

It does not know model families or dialects: the tags come with the request.
"""

from __future__ import annotations

import msgspec

from mlxd.text.thinking import Part, ThinkingSplitter, ThinkingTags


class ThinkingParams(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine must know to count thinking and to end it.

    `max_tokens` None is no limit. `closing_token_ids` are what the model is made to say when it has thought
    for that long; the tag that ends the block is among them.
    """

    tags: ThinkingTags
    max_tokens: int | None = None
    closing_token_ids: tuple[int, ...] = ()


class ThinkingWatch:
    """Follows one sequence. A token counts if it lies wholly inside a block: tags do not."""

    __slots__ = ("_is_over", "_params", "_splitter", "must_close", "num_tokens")

    def __init__(self, params: ThinkingParams) -> None:
        self._params = params
        self._splitter = ThinkingSplitter(params.tags)
        self._is_over = False
        self.num_tokens = 0
        self.must_close = False
        """the limit is reached, and the model is still thinking"""

    def add(self, text: str) -> None:
        """A token that gave `text`; "" where a character is incomplete."""
        if self._is_over:
            return
        splitter = self._splitter
        was_thinking = splitter.is_thinking
        for part, _ in splitter.feed(text):
            if part is Part.INTERRUPT:  # a tool call has begun: what follows is not for us to end
                self._is_over = True
                self.must_close = False
                return
        is_thinking = splitter.is_thinking
        self.num_tokens += was_thinking and is_thinking
        self._is_over = splitter.is_over
        limit = self._params.max_tokens
        # Not within a character: the closing tag would break it.
        self.must_close = is_thinking and limit is not None and self.num_tokens >= limit and text != ""
