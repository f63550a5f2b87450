"""What the prefix cache had for a request and, where it had little, why not.

It does not know HTTP or blocks; it turns tokens into text only when somebody asks.
"""

from __future__ import annotations

import enum
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from mlxd.engine.request import GenerationRequest, Request

MAX_DECODED_TOKENS = 32768
"""Decoding more would hold up the event loop: 50,000 take 7 ms."""
CONTEXT_TOKENS = 24
"""Tokens shown on either side of the one where a prompt parts from the cache."""


class HitType(enum.StrEnum):
    """How a prompt of N tokens met the cache, in the server guide's words; `m` of its tokens were reused.

    `miss`: m = 0.
    `exact`: m = N - 1, which is all that can be (the last token is computed for its logits), and this very
    prompt was admitted before, not too long ago. With recurrent state m is the last place where one is kept.
    `supersequence`: m is that otherwise: what is cached begins with the prompt and may go on.
    `prefix`: 0 < m < N - 1, and nothing cached goes on from there: a cached sequence ended where the prompt
    goes on. So it is with the next turn of a conversation.
    `lcp` (longest common prefix): 0 < m < N - 1, and what is cached goes on from there with other tokens.

    The tokens that requests still being prefilled have in common with the prompt count as cached once the
    plan that computes them was sent.
    """

    MISS = "miss"
    EXACT = "exact"
    SUPERSEQUENCE = "supersequence"
    PREFIX = "prefix"
    LCP = "lcp"


class Cause(enum.StrEnum):
    """Why no more was reused.

    `new`: nothing that goes on from there was cached. `diverged`: what was cached goes on with another token.
    `evicted`: the prompt's next block was cached once, and has been given up for others since.
    `prompt_logprobs`: the request asked for them, so its whole prompt had to be computed.
    `no_state`: what follows is cached, but of the model's recurrent layers no state was kept farther on.
    """

    NEW = "new"
    DIVERGED = "diverged"
    EVICTED = "evicted"
    PROMPT_LOGPROBS = "prompt_logprobs"
    NO_STATE = "no_state"


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """What a request got from the cache when it was first admitted.

    `cause` is None where all that could be reused was. `cached_token_ids` follow the `num_tokens` reused ones
    in the cache, where the prompt has others.
    """

    type: HitType
    num_tokens: int
    cause: Cause | None = None
    cached_token_ids: tuple[int, ...] = ()


class Detokenise(Protocol):
    """Tokens to text, special tokens shown."""

    def __call__(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str: ...


@dataclass(frozen=True, slots=True)
class PrefixReport:
    """A request's hit, and what it takes to explain it: a few tokens around the place, not the prompt.

    `message` is the index of the message that the first token not reused lies in, if known. `before` and
    `after` are the prompt's tokens on either side of it, `cached` those that the cache has in its place.
    """

    hit: PrefixHit
    num_prompt_tokens: int
    message: int | None = None
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    cached: tuple[int, ...] = ()

    @classmethod
    def of(cls, request: Request, decode: Detokenise, *, explain: bool) -> PrefixReport:
        """For a request that has been admitted. `explain` False keeps no tokens."""
        hit, params = request.prefix_hit, request.params
        assert hit is not None, "every admission says what the cache had"
        num_tokens, start = request.num_prompt_tokens, hit.num_tokens
        if hit.cause is None:
            return cls(hit, num_tokens)
        message = find_message(params, start, decode)
        if not explain:
            hit = replace(hit, cached_token_ids=())
            return cls(hit, num_tokens, message)
        tokens = params.prompt_token_ids
        before = tuple(tokens[max(0, start - CONTEXT_TOKENS) : start])
        after = tuple(tokens[start : start + CONTEXT_TOKENS])
        return cls(hit, num_tokens, message, before, after, hit.cached_token_ids)

    def to_json(self, decode: Detokenise | None, *, shows_cached: bool) -> dict[str, object]:
        """Under the names of /v1/status and more. None for `decode` leaves out all texts; without
        `shows_cached`, those that the cache has, which may be from anybody's prompt, are left out."""
        hit = self.hit
        miss: dict[str, object] | None = None
        if hit.cause is not None:
            miss = {"cause": hit.cause.value, "position": hit.num_tokens, "message": self.message}
            if self.after and decode is not None:
                miss["token"] = {"id": self.after[0], "text": decode(self.after[:1], False)}
                miss["text_before"] = decode(self.before, False)
                miss["text"] = decode(self.after, False)
            if self.cached and decode is not None and shows_cached:
                miss["cached_token"] = {"id": self.cached[0], "text": decode(self.cached[:1], False)}
                miss["cached_text"] = decode(self.cached, False)
        return {
            "cache_hit_type": hit.type.value,
            "cached_tokens": hit.num_tokens,
            "prompt_tokens": self.num_prompt_tokens,
            "cache_miss": miss,
        }


def find_message(params: GenerationRequest, position: int, decode: Detokenise) -> int | None:
    """The index of the message that prompt token `position` lies in; None if that is not known.

    What follows a message's text, up to that of the next, is counted to it. The tokens on the shorter side
    are decoded to find the character, so at most half of the prompt; nobody does that for MAX_DECODED_TOKENS.
    """
    starts, tokens = params.message_starts, params.prompt_token_ids
    if not starts:
        return None
    if min(position, len(tokens) - position) > MAX_DECODED_TOKENS:
        return None
    if position <= len(tokens) // 2:
        character = len(decode(tokens[:position], False))
    else:
        character = params.num_prompt_characters - len(decode(tokens[position:], False))
    return max(0, bisect_right(starts, character) - 1)
