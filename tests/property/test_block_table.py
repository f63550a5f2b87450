"""Any sequence of calls: extension and twin answer alike, and no reference is lost or invented.

It does not know how either keeps its books; a ledger of the caller's own references is all it adds.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable
from types import ModuleType

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mlxd._ext import block_table as extension
from tests.reference import block_table as twin

NUM_SLOTS = 4
MAX_BLOCKS_PER_SEQ = 5
MAX_BLOCK_SIZE = 5

any_slot = st.integers(-1, NUM_SLOTS)
slots = st.integers(0, NUM_SLOTS - 1)
any_num_tokens = st.integers(-1, MAX_BLOCKS_PER_SEQ * MAX_BLOCK_SIZE + 2)
any_rows = st.lists(st.tuples(any_slot, any_num_tokens), max_size=6)
rows = st.lists(st.tuples(slots, st.integers(0, MAX_BLOCKS_PER_SEQ * 2)), max_size=6)


class BlockTableMachine(RuleBasedStateMachine):
    """Both implementations, in step. `held` counts the references that this caller got from allocate."""

    @initialize(num_blocks=st.integers(2, 16), block_size=st.integers(1, MAX_BLOCK_SIZE))
    def start(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.held: Counter[int] = Counter()
        self.both = [self.make(module) for module in (extension, twin)]

    def make(self, module: ModuleType) -> tuple[object, object]:
        pool = module.BlockPool(self.num_blocks, self.block_size)
        return pool, module.BlockTables(pool, NUM_SLOTS, MAX_BLOCKS_PER_SEQ)

    def call(self, act: Callable[..., object]) -> object:
        """What `act(pool, tables)` returns, or the class of what it raises: the same for both."""
        outcomes = []
        for pool, tables in self.both:
            try:
                outcomes.append(act(pool, tables))
            except ValueError as error:
                outcomes.append(type(error))
        assert outcomes[0] == outcomes[1]
        return outcomes[0]

    def block_ids(self, slot: int) -> list[int]:
        return self.call(lambda pool, tables: tables.block_ids(slot))

    @rule(slot=any_slot, num_tokens=any_num_tokens)
    def reserve(self, slot: int, num_tokens: int) -> None:
        if self.call(lambda pool, tables: tables.reserve(slot, num_tokens)) is True:
            assert len(self.block_ids(slot)) * self.block_size >= num_tokens

    @rule(rows=st.one_of(rows, any_rows))
    def reserve_rows(self, rows: list[tuple[int, int]]) -> None:
        slots, context_lens = (array("i", (row[column] for row in rows)) for column in (0, 1))
        reserved = self.call(lambda pool, tables: tables.reserve_rows(slots, context_lens))
        if isinstance(reserved, int):
            for slot, context_len in rows[:reserved]:
                assert len(self.block_ids(slot)) * self.block_size >= context_len

    @rule(n=st.integers(-1, 6))
    def allocate(self, n: int) -> None:
        block_ids = self.call(lambda pool, tables: pool.allocate(n))
        if isinstance(block_ids, list):
            assert len(block_ids) == n and 0 not in block_ids
            self.held.update(block_ids)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def incref(self, data: st.DataObject) -> None:
        block_ids = data.draw(st.lists(st.sampled_from(sorted(self.held)), max_size=4))
        assert self.call(lambda pool, tables: pool.incref(block_ids)) is None
        self.held.update(block_ids)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def decref(self, data: st.DataObject) -> None:
        block_ids = data.draw(st.permutations(sorted(self.held.elements())))
        block_ids = block_ids[: data.draw(st.integers(1, len(block_ids)))]
        assert self.call(lambda pool, tables: pool.decref(block_ids)) is None
        self.held.subtract(block_ids)
        self.held = +self.held

    @rule(data=st.data())
    def decref_too_often(self, data: st.DataObject) -> None:
        """A free or unknown block, or one reference too many, behind others that could be dropped."""
        block_id = data.draw(st.integers(-1, self.num_blocks + 1))
        references = self.call(lambda pool, tables: pool.ref_cnt(block_id))
        wrong = [block_id] * (references + 1 if isinstance(references, int) else 1)
        block_ids = data.draw(st.permutations(wrong + sorted(self.held - Counter(wrong))))
        assert self.call(lambda pool, tables: pool.decref(block_ids)) is ValueError
        if not isinstance(references, int):
            assert self.call(lambda pool, tables: pool.incref(block_ids)) is ValueError

    @rule(source=slots, slot=slots, length=st.integers(0, MAX_BLOCKS_PER_SEQ))
    def share(self, source: int, slot: int, length: int) -> None:
        block_ids = self.block_ids(source)[:length]
        before = self.block_ids(slot)
        if self.call(lambda pool, tables: tables.share(slot, block_ids)) is None:
            assert self.block_ids(slot) == before + block_ids

    @rule(slot=any_slot, block_ids=st.lists(st.integers(-1, 17), max_size=4))
    def share_any(self, slot: int, block_ids: list[int]) -> None:
        self.call(lambda pool, tables: tables.share(slot, block_ids))

    @precondition(lambda self: self.held)
    @rule(slot=any_slot, index=st.integers(-1, MAX_BLOCKS_PER_SEQ), data=st.data())
    def replace(self, slot: int, index: int, data: st.DataObject) -> None:
        block_id = data.draw(st.sampled_from(sorted(self.held)))
        old = self.call(lambda pool, tables: tables.replace(slot, index, block_id))
        if isinstance(old, int):
            assert self.block_ids(slot)[index] == block_id
            del self.held[block_id]

    @rule(slot=any_slot)
    def release(self, slot: int) -> None:
        if self.call(lambda pool, tables: tables.release(slot)) is None:
            assert self.block_ids(slot) == []

    @rule(rows=st.one_of(rows, any_rows), data=st.data())
    def fill(self, rows: list[tuple[int, int]], data: st.DataObject) -> None:
        query_lens = [data.draw(st.integers(0, max(0, context_len))) for _, context_len in rows]
        columns = [array("i", column) for column in ([s for s, _ in rows], query_lens, [c for _, c in rows])]
        self.call(lambda pool, tables: tables.fill(*columns))

    @invariant()
    def books_agree(self) -> None:
        self.call(lambda pool, tables: (pool.num_free, pool.num_used, tables.check_integrity(self.held)))
        tables = [self.block_ids(slot) for slot in range(NUM_SLOTS)]
        owned = self.held + Counter(block_id for table in tables for block_id in table)
        assert self.call(lambda pool, tables: pool.num_used) == len(owned)
        for block_id, references in owned.items():
            assert self.call(lambda pool, tables, block_id=block_id: pool.ref_cnt(block_id)) == references

    def teardown(self) -> None:
        """Give everything back: the pool must be whole."""
        for pool, tables in getattr(self, "both", ()):
            pool.decref(list(self.held.elements()))
            for slot in range(NUM_SLOTS):
                tables.release(slot)
            tables.check_integrity()
            assert pool.num_free == self.num_blocks - 1


TestBlockTable = BlockTableMachine.TestCase
TestBlockTable.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
