"""What the prefix cache had for a request and, where it had little, why not.

It does not know HTTP or blocks; it turns tokens into text only when somebody asks.
"""

from __future__ import annotations

import enum
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from mlxd.engine.request import Request

MAX_REPORTS = 512
"""Requests that are remembered."""
CONTEXT_TOKENS = 24
"""Tokens shown on either side of the one where a prompt parts from the cache."""


class HitType(enum.StrEnum):
    """How a prompt of N tokens met the cache, in the server guide's words; `m` of its tokens were reused.

    `miss`: m = 0.
    `exact`: m = N - 1, which is all that can be (the last token is computed for its logits), and this very
    prompt was admitted before, not too long ago.
    `supersequence`: m = N - 1 otherwise: what is cached begins with the prompt and may go on.
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
    """

    NEW = "new"
    DIVERGED = "diverged"
    EVICTED = "evicted"
    PROMPT_LOGPROBS = "prompt_logprobs"


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
    """A request's hit, and what it takes to explain it: a few tokens around the place, not the prompt."""

    request_id: str
    client: str
    num_prompt_tokens: int
    hit: PrefixHit
    message: int | None
    """index of the message that the first token not reused lies in, if known"""
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @classmethod
    def of(cls, request: Request, hit: PrefixHit, *, explain: bool) -> PrefixReport:
        """`explain` False keeps no tokens."""
        params, start = request.params, hit.num_tokens
        message: int | None = None
        before: list[int] = []
        after: list[int] = []
        if hit.cause is not None and params.message_ends and start < params.message_ends[-1]:
            message = bisect_right(params.message_ends, start)
        if hit.cause is Cause.DIVERGED and explain:
            before = params.prompt_token_ids[max(0, start - CONTEXT_TOKENS) : start]
            after = params.prompt_token_ids[start : start + CONTEXT_TOKENS]
        return cls(
            request.request_id,
            params.client,
            request.num_prompt_tokens,
            hit,
            message,
            tuple(before),
            tuple(after),
        )

    def to_json(self, detokenise: Detokenise | None) -> dict[str, object]:
        """Under the names of /v1/status and more. None for `detokenise` leaves the texts out."""
        hit = self.hit
        return {
            "cache_hit_type": hit.type.value,
            "cached_tokens": hit.num_tokens,
            "prompt_tokens": self.num_prompt_tokens,
            "cache_miss": None if hit.cause is None else self._miss(hit, hit.cause, detokenise),
        }

    def _miss(self, hit: PrefixHit, cause: Cause, detokenise: Detokenise | None) -> dict[str, object]:
        miss: dict[str, object] = {
            "cause": cause.value,
            "position": hit.num_tokens,
            "message": self.message,
        }
        if self.after and detokenise is not None:
            cached = hit.cached_token_ids
            miss |= {
                "token": {"id": self.after[0], "text": detokenise(self.after[:1], False)},
                "cached_token": {"id": cached[0], "text": detokenise(cached[:1], False)},
                "text_before": detokenise(self.before, False),
                "text": detokenise(self.after, False),
                "cached_text": detokenise(cached, False),
            }
        return miss


class PrefixReports:
    """The reports of the last MAX_REPORTS admitted requests."""

    def __init__(self, *, explain: bool) -> None:
        self._explain = explain
        self._reports: OrderedDict[str, PrefixReport] = OrderedDict()

    def add(self, request: Request) -> bool:
        """Remember `request`, which has been admitted; False if that was not its first time."""
        hit = request.prefix_hit
        assert hit is not None, "every admission says what the cache had"
        if request.request_id in self._reports:
            return False
        self._reports[request.request_id] = PrefixReport.of(request, hit, explain=self._explain)
        if len(self._reports) > MAX_REPORTS:
            self._reports.popitem(last=False)
        return True

    def get(self, request_id: str) -> PrefixReport | None:
        return self._reports.get(request_id)

    def find(self, request_id: str, client: str | None) -> list[PrefixReport]:
        """Those of `request_id` and its choices `request_id-…`, oldest first; of `client`, or anybody's."""
        prefix = request_id + "-"
        return [
            report
            for key, report in self._reports.items()
            if (key == request_id or key.startswith(prefix)) and client in (None, report.client)
        ]
