"""What is cached of a request's tokens, and what is said of that.

It does not know how it is found, or who owns the blocks.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from mlxd.engine.prefix_report import Cause, HitType, PrefixHit
from mlxd.engine.snapshots import Snapshot

MAX_KNOWN_PROMPTS = 4096
"""Prompts by whose digest an identical one is recognised."""


@dataclass(slots=True, frozen=True)
class Match:
    """What is cached of a request's tokens: whole blocks, and the block where it parts from the nearest.

    `num_common` tokens of `nearest` (0: none) follow the blocks; then it has `other_token_ids`.
    `was_evicted`: the request's next block was there once, and has been given up.
    Of a model with states the blocks end with `snapshot`, the state there, and `nearest` is 0. `branch` is
    where the tokens part from what is cached, 0 if nothing cached goes on there; it is not before the blocks'
    end. `lacks_state`: it is behind it.
    """

    block_ids: list[int]
    nearest: int
    num_common: int
    other_token_ids: tuple[int, ...]
    was_evicted: bool
    snapshot: Snapshot | None = None
    branch: int = 0
    lacks_state: bool = False


@dataclass(slots=True, frozen=True)
class Held:
    """What is kept from eviction: cached full blocks, a path, and the state at its end if there is one."""

    block_ids: list[int]
    snapshot: Snapshot | None = None


class PromptLog:
    """Which prompts were there before: the last MAX_KNOWN_PROMPTS."""

    def __init__(self) -> None:
        self._digests: OrderedDict[bytes, None] = OrderedDict()

    def add(self, digest: bytes) -> bool:
        """Note a prompt; whether it was there before."""
        is_known = digest in self._digests
        self._digests[digest] = None
        self._digests.move_to_end(digest)
        if len(self._digests) > MAX_KNOWN_PROMPTS:
            self._digests.popitem(last=False)
        return is_known


def describe(match: Match, num_matched: int, most: int, *, is_known: bool) -> PrefixHit:
    """How a prompt met the cache: `num_matched` of its tokens were reused, of the `most` that can be."""
    if num_matched >= most:
        if num_matched == 0:
            return PrefixHit(HitType.MISS, 0)
        return PrefixHit(HitType.EXACT if is_known else HitType.SUPERSEQUENCE, num_matched)
    others = match.other_token_ids
    if match.was_evicted:
        cause = Cause.EVICTED
    elif match.lacks_state:
        cause = Cause.NO_STATE
    else:
        cause = Cause.DIVERGED if others else Cause.NEW
    if num_matched == 0:
        return PrefixHit(HitType.MISS, 0, cause, others)
    return PrefixHit(HitType.LCP if others else HitType.PREFIX, num_matched, cause, others)
