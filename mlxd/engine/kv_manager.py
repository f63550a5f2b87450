"""Slots and blocks: who owns which part of the KV cache, and what of it is cached for others.

It knows integers only; the tensors are the worker's. What it hands out, the worker never contradicts.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Protocol

from mlxd._ext.block_table import BlockPool, BlockTables
from mlxd._ext.hashed_tokens import HashedTokens
from mlxd._ext.prefix_index import PrefixIndex
from mlxd.engine.prefix_match import Held, Match, PromptLog, describe
from mlxd.engine.prefix_report import Cause, HitType, PrefixHit
from mlxd.engine.request import Request
from mlxd.engine.snapshots import Snapshots
from mlxd.step import NULL_BLOCK

SALT_BYTES = 16
Pairs = tuple[tuple[int, int], ...]
MAX_CHECKED_BLOCKS = 4096
"""of a pool whose blocks are looked at one by one for leaks: 3.7 ms if all are cached, on the event loop"""


class SecondTier(Protocol):
    """Who is told what the blocks of running requests hold."""

    def admitted(self, request: Request, tokens: HashedTokens, block_ids: Sequence[int]) -> None:
        """`request` got a slot; the first blocks of `tokens` were cached, as `block_ids`."""

    def offer(self, tokens: HashedTokens, first: int, block_ids: Sequence[int]) -> None:
        """Blocks `first` … of `tokens` are cached now, as `block_ids`."""

    def retract(self, tokens: HashedTokens, first: int, stop: int) -> None:
        """Blocks `first` … `stop` - 1 of `tokens` cannot be trusted, nor can what continues them."""


class KvManager:
    """Hands out slots (rows of the worker's state) and KV blocks, and takes them back.

    A running request has a slot in 0 … max_num_seqs - 1 and, in that slot's table, blocks for its tokens.
    A waiting or preempted one has neither. Blocks that were given back stay cached, and are reused by
    requests that begin with the same tokens under the same salt, until the pool runs out: then those whose
    last use is longest ago are evicted. `seed` (secret) goes into the salts, so that nobody can guess a hash.
    `num_snapshots` is the worker's: where it is not 0, blocks are reused only up to a state that was kept.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        prefix_caching: bool = True,
        seed: int = 0,
        second_tier: SecondTier | None = None,
        num_snapshots: int = 0,
    ) -> None:
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        # A context may be as long as the pool, however small: the scheduler checks lengths against both.
        max_blocks_per_seq = -(-max_model_len // block_size)
        self.pool = BlockPool(num_blocks, block_size)
        # The last slot is no request's: blocks that come back from the second tier pass through it.
        self.tables = BlockTables(self.pool, max_num_seqs + 1, max_blocks_per_seq)
        self.index = PrefixIndex(self.tables)
        self.states = Snapshots(num_snapshots, block_size) if prefix_caching and num_snapshots else None
        self.num_evicted_blocks = 0
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self.num_slots = max_num_seqs
        self._salt_key = seed.to_bytes(32, "little", signed=True)
        self._no_tokens = HashedTokens(block_size, bytes(SALT_BYTES))
        self._copies: list[tuple[int, int]] = []
        self._prompts = PromptLog()
        self._held: Counter[int] = Counter()
        self._second_tier = second_tier
        self._num_shared = [0] * max_num_seqs
        """of each slot: leading blocks that it found cached"""
        self._num_offered = [0] * max_num_seqs
        """and those that need not be offered to the second tier any more"""

    @property
    def num_total_blocks(self) -> int:
        """Blocks that can be handed out (the null block cannot)."""
        return self.pool.num_blocks - 1

    @property
    def num_used_blocks(self) -> int:
        """Blocks that running requests or pins hold."""
        return self.num_total_blocks - self.num_available_blocks

    @property
    def num_available_blocks(self) -> int:
        """Blocks that a newcomer can have: free ones, and cached ones that can be evicted."""
        return self.pool.num_free + self.index.num_evictable

    @property
    def num_cached_blocks(self) -> int:
        """Blocks whose tokens others can reuse, held or not."""
        return self.index.num_cached

    @property
    def num_used_slots(self) -> int:
        return self.num_slots - len(self._free_slots)

    def match(self, request: Request) -> Match:
        """What is cached of `request`, of all its tokens but the last: that one's logits are needed.

        Nothing while the logits of its prompt are needed.
        """
        if not self.prefix_caching or request.needs_prompt_logits:
            return Match([], 0, 0, (), False)
        tokens = self._tokens(request)
        block_ids, nearest, num_common = self.index.match(tokens, tokens.num_tokens - 1)
        if self.states is not None:
            return self._match_states(self.states, tokens, block_ids, nearest)
        others = self.index.block_tokens(nearest)[num_common:] if nearest else ()
        was_evicted = self.index.was_evicted(tokens, len(block_ids))
        return Match(block_ids, nearest, num_common, tuple(others), was_evicted)

    def num_cached_tokens(self, token_ids: list[int], cache_salt: str) -> int:
        """How many of the first of `token_ids` a request with that salt could reuse now."""
        tokens = self.hash_tokens(token_ids, cache_salt)
        block_ids, _, num_common = self.index.match(tokens, len(token_ids))
        if self.states is not None:
            snapshot = self.states.longest(tokens, len(block_ids))
            return 0 if snapshot is None else snapshot.num_blocks * self.block_size
        return len(block_ids) * self.block_size + num_common

    def beginning(self, request: Request) -> bytes:
        """Equal for all that may share blocks; one for all that have none to share."""
        tokens = self._tokens(request)
        return tokens.block_hash(0) if tokens.num_blocks else b""

    def tokens_soon_cached(
        self, request: Request, match: Match, others: Iterable[tuple[Request, int]]
    ) -> int:
        """How many tokens beyond `match` will be cached once each of `others` has computed so many tokens."""
        if request.needs_prompt_logits:
            return 0
        tokens = self._tokens(request)
        num_matched = len(match.block_ids) * self.block_size + match.num_common
        most = (tokens.num_tokens - 1) // self.block_size
        if most * self.block_size <= num_matched:
            return 0
        soon = 0
        for other, num_computed_tokens in others:
            common = min(tokens.common_blocks(self._tokens(other)), most)
            if self.states is None:
                soon = max(soon, min(common, num_computed_tokens // self.block_size))
            elif num_computed_tokens <= common * self.block_size and self.states.is_saved_at(
                other.slot, num_computed_tokens
            ):
                soon = max(soon, num_computed_tokens // self.block_size)
        return max(0, soon * self.block_size - num_matched)

    def admit(self, request: Request, match: Match, headroom: int) -> bool:
        """Give `request` a slot and blocks for every token it has, or nothing and False.

        What `match` found is reused and counts as computed. `headroom` blocks must be left afterwards, free
        or evictable. Taking the whole prompt's blocks at once means that requests which are being prefilled
        can never block each other half way.
        """
        if not self._free_slots:
            return False
        slot, index = self._free_slots[-1], self.index
        index.share(slot, match.block_ids)
        adopted = False
        if match.num_common:
            index.touch(match.nearest)
            adopted = index.adopt(slot, match.nearest, match.num_common)
        num_blocks = -(-request.num_tokens // self.block_size)
        missing = num_blocks - len(match.block_ids) - adopted
        num_matched = len(match.block_ids) * self.block_size + match.num_common
        copies = match.num_common > 0 and not adopted
        # A plan's copies have no order: what one reads must not be what another writes. Sources are the last
        # that would be evicted.
        untouched = len(self._copies) if copies else 0
        if self.num_available_blocks < missing + headroom + untouched:
            num_returned = num_matched if adopted else num_matched - match.num_common
            index.release(slot, self._tokens(request), num_returned)
            return False
        # This may evict `nearest`, even give its block to this request: it is copied before anything is
        # written.
        self._make_room(missing)
        if not self.tables.reserve(slot, request.num_tokens):
            raise AssertionError(f"{self.pool.num_free} blocks are free, but {missing} were refused")
        if copies:
            self._copies.append((match.nearest, self.tables.block_ids(slot)[len(match.block_ids)]))
        self._free_slots.pop()
        request.slot = slot
        request.num_computed_tokens = num_matched
        self._num_shared[slot] = self._num_offered[slot] = len(match.block_ids)
        if self._second_tier is not None:
            self._second_tier.admitted(request, self._tokens(request), match.block_ids)
        if self.states is not None:
            wanted = match.branch, request.params.num_opening_tokens
            answers = request.max_tokens > 0 or request.prompt_logprobs is not None
            self.states.begin(slot, match.snapshot, wanted, request.num_prompt_tokens, answers=answers)
        if request.prefix_hit is None:
            # Tokens of the answer that are known already may be cached too.
            num_matched = min(num_matched, request.num_prompt_tokens - 1)
            request.prefix_hit = self._hit(request, match, num_matched)
            request.num_cached_tokens = num_matched
        return True

    def could_admit(self, request: Request, match: Match, headroom: int) -> bool:
        """Whether `admit` would probably succeed."""
        missing = -(-request.num_tokens // self.block_size) - len(match.block_ids)
        return bool(self._free_slots) and self.num_available_blocks >= missing + headroom

    def restore(self, tokens: HashedTokens, first: int, stop: int, headroom: int) -> list[int]:
        """Cache blocks `first` … `stop` - 1 of `tokens`, which the caller has the worker fill before a plan.

        Returns the block of each, NULL_BLOCK for the leading ones that are cached already; nothing where
        those before `first` no longer are, or less than `headroom` blocks would be left, free or evictable.
        """
        path, _, _ = self.index.match(tokens, stop * self.block_size)
        if len(path) < first:
            return []
        slot = self.num_slots
        self.index.share(slot, path)
        missing = stop - len(path)
        num_tokens = len(path) * self.block_size
        block_ids: list[int] = []
        if self.num_available_blocks >= missing + headroom:
            self._make_room(missing)
            num_tokens = stop * self.block_size
            if not self.tables.reserve(slot, num_tokens):
                raise AssertionError(f"{self.pool.num_free} blocks are free, but {missing} were refused")
            block_ids = [NULL_BLOCK] * (len(path) - first) + self.tables.block_ids(slot)[len(path) :]
        self.index.release(slot, tokens, num_tokens)
        return block_ids

    def reserve_rows(self, slots: array[int], context_lens: array[int]) -> int:
        """Make slot i hold context_lens[i] tokens, in order; returns how many leading rows got theirs.

        Each row lacks one block at the most. Cached blocks are evicted as far as needed.
        """
        num_rows = len(slots)
        num_reserved = self.tables.reserve_rows(slots, context_lens)
        # About one row in block_size begins a block: evicting one for each row would empty the cache early.
        while num_reserved < num_rows and self._evict(1 + (num_rows - num_reserved) // self.block_size):
            num_reserved = self.tables.reserve_rows(slots, context_lens)
        return num_reserved

    def take_copies(self) -> tuple[tuple[int, int], ...]:
        """The (source, destination) blocks to be copied at the start of the plan that is being made."""
        copies = tuple(self._copies)
        self._copies.clear()
        return copies

    def take_states(self, rows: list[Request]) -> tuple[Pairs, Pairs]:
        """`load_states` and `save_states` of the plan that is being made, of these requests."""
        states = self.states
        if states is None:
            return (), ()
        saves = []
        for request in rows:
            position = request.num_computed_tokens
            if position % self.block_size == 0 and states.is_saved_at(request.slot, position):
                number = states.save(request.slot, position, self._tokens(request))
                if number is not None:
                    saves.append((request.slot, number))
        return states.take_loads(), tuple(saves)

    def publish(self, request: Request) -> None:
        """Cache the blocks that plans sent so far have filled, and whose tokens are known."""
        tokens = self._tokens(request)
        num_valid = self._num_valid(request, tokens)
        self._publish(request.slot, tokens, num_valid)
        if self.states is not None:
            self.states.publish(request.slot, tokens, num_valid)

    def release(self, request: Request, *, keep: bool = True) -> int:
        """Take back the slot and all blocks; returns the slot.

        What was computed stays cached, also if only a part of the prompt was. Not so with `keep` False: then
        whatever the request computed is forgotten, because it cannot be trusted.
        """
        slot = request.slot
        tokens = self._tokens(request)
        num_valid = 0
        if keep:
            num_valid = self._num_valid(request, tokens)
            self._publish(slot, tokens, num_valid)
        else:
            self.index.discard(slot)
            if self._second_tier is not None:
                self._second_tier.retract(tokens, self._num_shared[slot], self._num_offered[slot])
        if self.states is not None:
            self.states.release(slot, tokens, num_valid, keep=keep, is_proven=request.is_proven)
            num_valid -= num_valid % self.block_size  # there is never a state within a block
        self.index.release(slot, tokens, num_valid)
        self._free_slots.append(slot)
        request.slot = -1
        return slot

    def clear(self, max_blocks: int) -> int:
        """Forget up to so many cached blocks that nobody holds, the oldest first; returns how many."""
        return self.index.evict(max_blocks)

    def hold(self, tokens: HashedTokens) -> Held:
        """Keep from eviction, until `unhold`, whatever full blocks are cached of `tokens`."""
        block_ids, _, _ = self.index.match(tokens, tokens.num_tokens)
        snapshot = None
        if self.states is not None:
            snapshot = self.states.longest(tokens, len(block_ids))
            if snapshot is None or not self.states.hold(snapshot):
                return Held([])
            block_ids = block_ids[: snapshot.num_blocks]
        self.index.hold(block_ids)
        self._held.update(block_ids)
        return Held(block_ids, snapshot)

    def unhold(self, held: Held) -> None:
        """Give back what `hold` gave."""
        self.index.unhold(held.block_ids)
        self._held.subtract(held.block_ids)
        self._held += Counter()  # drops those that are no longer held
        if self.states is not None and held.snapshot is not None:
            self.states.unhold(held.snapshot)

    @property
    def num_held_blocks(self) -> int:
        return len(self._held)

    def check_integrity(self) -> None:
        """Each block of a small pool has exactly the references it should; no slot is free twice.

        Raises AssertionError with the numbers.
        """
        if self.pool.num_blocks <= MAX_CHECKED_BLOCKS:
            self.index.check_integrity(self._held)
        if len(set(self._free_slots)) != len(self._free_slots):
            raise AssertionError(f"a slot is free twice: {sorted(self._free_slots)}")
        if self._copies:
            raise AssertionError(f"copies were left out of a plan: {self._copies}")
        if self.states is not None:
            self.states.check_integrity()

    def hash_tokens(self, token_ids: list[int], cache_salt: str) -> HashedTokens:
        """`token_ids` as the index wants them."""
        digest = blake2b(cache_salt.encode(), key=self._salt_key, digest_size=SALT_BYTES)
        tokens = HashedTokens(self.block_size, digest.digest())
        tokens.extend(token_ids)
        return tokens

    def tokens_of(self, request: Request) -> HashedTokens:
        """The request's known tokens as the index has them."""
        return self._tokens(request)

    def _match_states(self, states: Snapshots, tokens: HashedTokens, path: list[int], nearest: int) -> Match:
        """What can be reused of the cached `path`, which `nearest` goes on with other tokens, if not 0."""
        snapshot = states.longest(tokens, len(path))
        num_blocks = 0 if snapshot is None else snapshot.num_blocks
        lacks_state = num_blocks < len(path)
        others = self.index.block_tokens(nearest) if nearest and not lacks_state else ()
        was_evicted = not lacks_state and self.index.was_evicted(tokens, len(path))
        branch = len(path) * self.block_size if nearest else 0
        return Match(path[:num_blocks], 0, 0, tuple(others), was_evicted, snapshot, branch, lacks_state)

    def _publish(self, slot: int, tokens: HashedTokens, num_valid: int) -> None:
        self.index.publish(slot, tokens, num_valid)
        first, stop = self._num_offered[slot], num_valid // self.block_size
        if self._second_tier is not None and first < stop:
            self._second_tier.offer(tokens, first, self.tables.block_ids(slot)[first:stop])
            self._num_offered[slot] = stop

    def _make_room(self, num_blocks: int) -> None:
        """Evict until so many blocks are free, or nothing is left to evict."""
        if num_blocks > self.pool.num_free:
            self._evict(num_blocks - self.pool.num_free)

    def _evict(self, num_blocks: int) -> int:
        num_evicted = self.index.evict(num_blocks)
        self.num_evicted_blocks += num_evicted
        return num_evicted

    def _tokens(self, request: Request) -> HashedTokens:
        """The request's known tokens, hashed; each is hashed once. None of them where nothing is cached."""
        if not self.prefix_caching:
            return self._no_tokens
        tokens = request.hashed_tokens
        if tokens is None:
            tokens = self.hash_tokens(request.params.prompt_token_ids, request.params.cache_salt)
            request.hashed_tokens = tokens
        num_known_outputs = tokens.num_tokens - request.num_prompt_tokens
        if num_known_outputs < len(request.output_token_ids):
            tokens.extend(request.output_token_ids[num_known_outputs:])
        return tokens

    def _num_valid(self, request: Request, tokens: HashedTokens) -> int:
        """Leading tokens that are known, and whose keys and values all plans sent so far will have written.

        Each decode row computes the token that the row before sampled; of the samples in flight, the last
        one has not been computed by anybody.
        """
        computed = request.num_computed_tokens - max(0, request.num_pending_tokens - 1)
        return min(computed, tokens.num_tokens)

    def _hit(self, request: Request, match: Match, num_matched: int) -> PrefixHit:
        if not self.prefix_caching:
            return PrefixHit(HitType.MISS, 0)
        num_tokens = request.num_prompt_tokens
        is_known = self._prompts.add(self._tokens(request).digest(num_tokens))
        if request.needs_prompt_logits:
            return PrefixHit(HitType.MISS, 0, Cause.PROMPT_LOGPROBS)
        most = num_tokens - 1
        if self.states is not None:
            most = min(most, self.states.last_point(num_tokens, answers=request.max_tokens > 0))
        return describe(match, num_matched, most, is_known=is_known)
