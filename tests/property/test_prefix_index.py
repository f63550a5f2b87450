"""Random trees of prompts: extension and twin answer alike, and a hit is the longest there is, and true.

It does not know either's books. It keeps what the pool's places were last filled with (a token's keys and
values depend on all tokens before it, and on the salt), and asks of every hit that it holds just that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

import hypothesis.strategies as st
from hypothesis import given, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

from mlxd._ext import block_table, hashed_tokens, prefix_index
from tests.reference import block_table as block_table_twin
from tests.reference import hashed_tokens as hashed_tokens_twin
from tests.reference import prefix_index as prefix_index_twin

NUM_SLOTS = 4
MAX_BLOCKS_PER_SEQ = 8
SALTS = (b"a" * 16, b"b" * 16)

slots = st.integers(0, NUM_SLOTS - 1)
any_slot = st.integers(-1, NUM_SLOTS)
salts = st.sampled_from([SALTS[0], *SALTS])
# Two tokens only: most prompts share a beginning with others.
some_tokens = st.lists(st.integers(0, 1), max_size=12)

Place = tuple[int, int]
Content = tuple[bytes, tuple[int, ...]]


class Request:
    """A slot in use: its tokens in both implementations, the computed ones, and the blocks it shared."""

    def __init__(self, salt: bytes, both: list[object]) -> None:
        self.salt = salt
        self.both = both
        self.token_ids: list[int] = []
        self.num_computed = 0
        self.num_shared = 0

    def extend(self, token_ids: list[int]) -> None:
        self.token_ids += token_ids
        for tokens in self.both:
            tokens.extend(token_ids)


class PrefixIndexMachine(RuleBasedStateMachine):
    """Both implementations, in step."""

    @initialize(num_blocks=st.integers(3, 24), block_size=st.integers(1, 4))
    def start(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.running: dict[int, Request] = {}
        self.held: list[list[int]] = []
        self.content: dict[Place, Content] = {}
        self.both = []
        for table_module, hash_module, index_module in (
            (block_table, hashed_tokens, prefix_index),
            (block_table_twin, hashed_tokens_twin, prefix_index_twin),
        ):
            pool = table_module.BlockPool(num_blocks, block_size)
            tables = table_module.BlockTables(pool, NUM_SLOTS, MAX_BLOCKS_PER_SEQ)
            index = index_module.PrefixIndex(tables)
            self.both.append(
                SimpleNamespace(pool=pool, tables=tables, index=index, HashedTokens=hash_module.HashedTokens)
            )

    def call(self, act: Callable[..., object], request: Request | None = None) -> object:
        """What `act` returns, or the class of what it raises: the same for both."""
        outcomes = []
        for number, side in enumerate(self.both):
            try:
                outcomes.append(act(side, request.both[number]) if request else act(side))
            except ValueError as error:
                outcomes.append(type(error))
        assert outcomes[0] == outcomes[1]
        return outcomes[0]

    def hashed(self, salt: bytes, token_ids: list[int]) -> Request:
        request = Request(salt, [side.HashedTokens(self.block_size, salt) for side in self.both])
        request.extend(token_ids)
        return request

    def match(self, request: Request, max_tokens: int) -> tuple[list[int], int, int]:
        """The hit, checked against every prefix in the index and against what the places hold."""
        ours, plain = (
            side.index.match(tokens, max_tokens) for side, tokens in zip(self.both, request.both, strict=True)
        )
        # Which of several equally near blocks is named may differ.
        assert (ours[0], ours[1] == 0, ours[2]) == (plain[0], plain[1] == 0, plain[2])
        path, nearest, num_common = ours
        assert len(path) * self.block_size + num_common == self.longest(request, max_tokens)
        places = [(b, o) for b in path for o in range(self.block_size)]
        places += [(nearest, offset) for offset in range(num_common)]
        for position, place in enumerate(places):
            assert self.content[place] == (request.salt, tuple(request.token_ids[: position + 1]))
        return ours

    def longest(self, request: Request, max_tokens: int) -> int:
        """The longest beginning of the tokens in a dictionary of all prefixes in the twin's blocks."""
        blocks = self.both[1].index.blocks
        salt = request.both[1].salt
        prefixes = {()}
        for block in blocks.values():
            token_ids = block.token_ids
            parent = block.parent
            while parent:
                token_ids = blocks[parent].token_ids + token_ids
                parent = blocks[parent].parent
            if block.salt == salt:
                prefixes |= {token_ids[:length] for length in range(len(token_ids) + 1)}
        token_ids = tuple(request.token_ids)
        return max(length for length in range(max_tokens + 1) if token_ids[:length] in prefixes)

    def make_room(self, num_blocks: int) -> bool:
        def act(side: SimpleNamespace) -> bool:
            if side.pool.num_free + side.index.num_evictable < num_blocks:
                return False
            side.index.evict(num_blocks - side.pool.num_free)
            return True

        return self.call(act) is True

    def level_free_lists(self) -> None:
        """discard() frees in no set order: bring both free lists into one."""
        for side in self.both:
            side.pool.decref(sorted(side.pool.allocate(side.pool.num_free)))

    prompts = Bundle("prompts")

    @rule(target=prompts, salt=salts, token_ids=some_tokens.filter(bool))
    def new_prompt(self, salt: bytes, token_ids: list[int]) -> tuple[bytes, list[int]]:
        return salt, token_ids

    @rule(target=prompts, prompt=prompts, salt=salts, length=st.integers(0, 20), more=some_tokens)
    def branch(
        self, prompt: tuple[bytes, list[int]], salt: bytes, length: int, more: list[int]
    ) -> tuple[bytes, list[int]]:
        """A prompt that begins as another does."""
        return salt, prompt[1][:length] + (more or [0])

    @rule(slot=slots, prompt=prompts, num_computed=st.integers(0, 40))
    def turn(self, slot: int, prompt: tuple[bytes, list[int]], num_computed: int) -> None:
        """A request from beginning to end, which may come early."""
        if self.admit(slot, prompt):
            self.compute(slot, num_computed)
            self.finish(slot)

    @rule(slot=slots, prompt=prompts)
    def begin(self, slot: int, prompt: tuple[bytes, list[int]]) -> None:
        self.admit(slot, prompt)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), num_tokens=st.integers(1, 12))
    def go_on(self, data: st.DataObject, num_tokens: int) -> None:
        self.compute(data.draw(st.sampled_from(sorted(self.running))), num_tokens)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.finish(data.draw(st.sampled_from(sorted(self.running))))

    def admit(self, slot: int, prompt: tuple[bytes, list[int]]) -> bool:
        """What a scheduler does: share the hit, take over or copy the block where prompts part, reserve."""
        salt, token_ids = prompt
        if slot in self.running:
            return False
        request = self.hashed(salt, token_ids)
        path, nearest, num_common = self.match(request, len(token_ids) - 1)
        self.call(lambda side: side.index.share(slot, path))
        needed = -(-len(token_ids) // self.block_size) - len(path)
        adopted = False
        if num_common:
            self.call(lambda side: side.index.touch(nearest))
            adopted = self.call(lambda side: side.index.adopt(slot, nearest, num_common)) is True
        num_cached = len(path) * self.block_size + num_common * adopted
        if len(token_ids) > MAX_BLOCKS_PER_SEQ * self.block_size or not self.make_room(needed - adopted):
            # Refused after all: what was taken over goes back.
            self.call(lambda side, tokens: side.index.release(slot, tokens, num_cached), request)
            return False
        copied = [self.content[nearest, offset] for offset in range(num_common)]
        assert self.call(lambda side: side.tables.reserve(slot, len(token_ids))) is True
        if num_common and not adopted:
            destination = self.call(lambda side: side.tables.block_ids(slot))[len(path)]
            for offset, content in enumerate(copied):
                self.content[destination, offset] = content
        request.num_computed = len(path) * self.block_size + num_common
        request.num_shared = len(path)
        self.running[slot] = request
        return True

    def compute(self, slot: int, num_tokens: int) -> None:
        """Fill places, and publish what is full."""
        request = self.running[slot]
        table = self.call(lambda side: side.tables.block_ids(slot))
        stop = min(request.num_computed + num_tokens, len(request.token_ids))
        for position in range(request.num_computed, stop):
            place = table[position // self.block_size], position % self.block_size
            self.content[place] = request.salt, tuple(request.token_ids[: position + 1])
        request.num_computed = stop
        self.call(lambda side, tokens: side.index.publish(slot, tokens, stop), request)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), token_ids=some_tokens)
    def generate(self, data: st.DataObject, token_ids: list[int]) -> None:
        slot = data.draw(st.sampled_from(sorted(self.running)))
        request = self.running[slot]
        num_tokens = len(request.token_ids) + len(token_ids)
        if num_tokens > MAX_BLOCKS_PER_SEQ * self.block_size:
            return
        needed = -(-num_tokens // self.block_size) - self.call(lambda side: side.tables.num_blocks(slot))
        if self.make_room(max(needed, 0)):
            assert self.call(lambda side: side.tables.reserve(slot, num_tokens)) is True
            request.extend(token_ids)

    def finish(self, slot: int) -> None:
        request = self.running.pop(slot)
        self.call(lambda side, tokens: side.index.release(slot, tokens, request.num_computed), request)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        """A request that failed leaves nothing that it computed, and others' that build on it go too."""
        slot = data.draw(st.sampled_from(sorted(self.running)))
        request = self.running.pop(slot)
        own = self.call(lambda side: side.tables.block_ids(slot)[request.num_shared :])
        self.call(lambda side: side.index.discard(slot))
        self.call(lambda side, tokens: side.index.release(slot, tokens, request.num_computed), request)
        self.level_free_lists()
        for block_id in own:
            assert self.call(lambda side, block_id=block_id: side.index.block_tokens(block_id)) is ValueError

    @rule(prompt=prompts)
    def hold(self, prompt: tuple[bytes, list[int]]) -> None:
        path, _, _ = self.match(self.hashed(*prompt), len(prompt[1]))
        assert self.call(lambda side: side.index.hold(path)) is None
        self.held.append(path)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def unhold(self, data: st.DataObject) -> None:
        path = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        assert self.call(lambda side: side.index.unhold(path)) is None

    @rule(n=st.integers(-1, 8))
    def evict(self, n: int) -> None:
        before = self.both[0].index.num_evictable
        assert self.call(lambda side: side.index.evict(n)) == min(max(n, 0), before)

    @rule(prompt=prompts, data=st.data())
    def look(self, prompt: tuple[bytes, list[int]], data: st.DataObject) -> None:
        salt, token_ids = prompt
        request = self.hashed(salt, token_ids)
        path, _, _ = self.match(request, data.draw(st.integers(0, len(token_ids))))
        for index, block_id in enumerate(path):
            block = self.call(lambda side, block_id=block_id: side.index.block_tokens(block_id))
            assert block == token_ids[index * self.block_size : (index + 1) * self.block_size]
        for block_id in range(-1, self.num_blocks + 1):
            for index in range(len(token_ids) // self.block_size):
                self.call(
                    lambda side, tokens, block_id=block_id, index=index: side.index.is_cached_as(
                        block_id, tokens.block_hash(index)
                    ),
                    request,
                )
        for index, block_id in enumerate(path):
            assert self.both[0].index.is_cached_as(block_id, request.both[0].block_hash(index))
        # The extension may have forgotten an eviction, but never invents one.
        for index in range(-1, len(token_ids) + 1):
            ours, plain = (
                side.index.was_evicted(tokens, index)
                for side, tokens in zip(self.both, request.both, strict=True)
            )
            assert plain or not ours

    @rule(
        slot=any_slot,
        block_ids=st.lists(st.integers(-1, 25), max_size=3),
        num_tokens=st.integers(-1, 14),
        token_ids=some_tokens,
        block_size=st.integers(1, 4),
    )
    def wrong_calls(
        self, slot: int, block_ids: list[int], num_tokens: int, token_ids: list[int], block_size: int
    ) -> None:
        """Whatever is asked, both refuse the same and stay whole."""
        request = Request(SALTS[0], [side.HashedTokens(block_size, SALTS[0]) for side in self.both])
        request.extend(token_ids)
        if num_tokens > len(token_ids) or num_tokens < 0 or block_size != self.block_size:
            for method in ("publish", "release"):
                act = self.call(
                    lambda side, tokens, method=method: getattr(side.index, method)(
                        min(max(slot, 0), NUM_SLOTS - 1), tokens, num_tokens
                    ),
                    request,
                )
                assert act is ValueError
            assert self.call(lambda side, tokens: side.index.match(tokens, num_tokens), request) is ValueError
        if slot in self.running or not 0 <= slot < NUM_SLOTS:
            assert self.call(lambda side: side.index.share(slot, block_ids)) is ValueError
        for block_id in block_ids:
            self.call(lambda side, block_id=block_id: side.index.block_tokens(block_id))
            self.call(lambda side, block_id=block_id: side.index.touch(block_id))
        if self.call(lambda side: side.index.hold(block_ids)) is None:
            self.call(lambda side: side.index.unhold(block_ids))

    @invariant()
    def books_agree(self) -> None:
        held = Counter(block_id for path in self.held for block_id in path)
        self.call(
            lambda side: (
                side.pool.num_free,
                side.index.num_cached,
                side.index.num_evictable,
                [side.tables.block_ids(slot) for slot in range(NUM_SLOTS)],
                side.index.check_integrity(held),
            )
        )

    def teardown(self) -> None:
        """Give everything back and evict it: the pool must be whole."""
        for number, side in enumerate(getattr(self, "both", ())):
            for path in self.held:
                side.index.unhold(path)
            for slot, request in self.running.items():
                side.index.release(slot, request.both[number], request.num_computed)
            side.index.evict(self.num_blocks)
            assert side.index.num_cached == 0
            side.index.check_integrity()
            assert side.pool.num_free == self.num_blocks - 1


@given(
    st.integers(1, 7),
    st.lists(st.lists(st.integers(0, 2), max_size=15), max_size=20),
    st.lists(st.lists(st.integers(0, 2), max_size=15), max_size=10),
)
def test_a_hit_is_the_longest_prefix_in_a_dictionary_of_all(
    block_size: int, prompts: list[list[int]], asked: list[list[int]]
) -> None:
    """Nothing is evicted here: whatever was computed, whole blocks or not, is found to the token."""
    tables = block_table.BlockTables(block_table.BlockPool(400, block_size), 1, 15)
    index = prefix_index.PrefixIndex(tables)
    prefixes: set[tuple[int, ...]] = {()}
    for prompt in prompts:
        tokens = hashed_tokens.HashedTokens(block_size, SALTS[0])
        tokens.extend(prompt)
        assert tables.reserve(0, len(prompt))
        index.release(0, tokens, len(prompt))
        prefixes.update(tuple(prompt[:length]) for length in range(len(prompt) + 1))
    index.check_integrity()
    for prompt in prompts + asked:
        tokens = hashed_tokens.HashedTokens(block_size, SALTS[0])
        tokens.extend(prompt)
        path, nearest, num_common = index.match(tokens, len(prompt))
        longest = max(length for length in range(len(prompt) + 1) if tuple(prompt[:length]) in prefixes)
        assert len(path) * block_size + num_common == longest
        found = [token for block_id in path for token in index.block_tokens(block_id)]
        if num_common:
            found += index.block_tokens(nearest)[:num_common]
        assert found == prompt[:longest]
        tokens = hashed_tokens.HashedTokens(block_size, SALTS[1])
        tokens.extend(prompt)
        assert index.match(tokens, len(prompt)) == ([], 0, 0), "another salt finds nothing"


TestPrefixIndex = PrefixIndexMachine.TestCase
TestPrefixIndex.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
