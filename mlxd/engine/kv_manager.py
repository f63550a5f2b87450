"""Slots and blocks: who owns which part of the KV cache.

It knows integers only; the tensors are the worker's. What it hands out, the worker never contradicts.
"""

from __future__ import annotations

from array import array

from mlxd._ext.block_table import BlockPool, BlockTables
from mlxd.engine.request import Request


class KvManager:
    """Hands out slots (rows of the worker's state) and KV blocks, and takes them back.

    A running request has a slot in 0 … max_num_seqs - 1 and, in that slot's table, blocks for its tokens.
    A waiting or preempted one has neither.
    """

    def __init__(self, *, num_blocks: int, block_size: int, max_num_seqs: int, max_model_len: int) -> None:
        self.block_size = block_size
        # A context may be as long as the pool, however small: the scheduler checks lengths against both.
        max_blocks_per_seq = -(-max_model_len // block_size)
        self.pool = BlockPool(num_blocks, block_size)
        self.tables = BlockTables(self.pool, max_num_seqs, max_blocks_per_seq)
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self.num_slots = max_num_seqs

    @property
    def num_total_blocks(self) -> int:
        """Blocks that can be handed out (the null block cannot)."""
        return self.pool.num_blocks - 1

    @property
    def num_used_blocks(self) -> int:
        return self.num_total_blocks - self.pool.num_free

    @property
    def num_used_slots(self) -> int:
        return self.num_slots - len(self._free_slots)

    def admit(self, request: Request, headroom: int) -> bool:
        """Give `request` a slot and blocks for every token it has, or nothing and False.

        `headroom` blocks must be left free afterwards.
        Taking the whole prompt's blocks at once means that requests which are being prefilled can never
        block each other half way.
        """
        num_blocks = -(-request.num_tokens // self.block_size)
        if not self._free_slots or self.pool.num_free < num_blocks + headroom:
            return False
        slot = self._free_slots[-1]
        if not self.tables.reserve(slot, request.num_tokens):
            raise AssertionError(f"{self.pool.num_free} blocks are free, but {num_blocks} were refused")
        self._free_slots.pop()
        request.slot = slot
        return True

    def reserve_rows(self, slots: array[int], context_lens: array[int]) -> int:
        """Make slot i hold context_lens[i] tokens, in order; returns how many leading rows got theirs."""
        return self.tables.reserve_rows(slots, context_lens)

    def release(self, request: Request) -> int:
        """Take back the slot and all blocks; returns the slot."""
        slot = request.slot
        self.tables.release(slot)
        self._free_slots.append(slot)
        request.slot = -1
        return slot

    def fits(self, num_tokens: int) -> bool:
        """Whether a request of `num_tokens` could ever run, alone in the pool."""
        return -(-num_tokens // self.block_size) <= self.num_total_blocks

    def check_integrity(self) -> None:
        """Free + owned = all, each count right. Raises AssertionError with the numbers."""
        self.tables.check_integrity()
        if len(set(self._free_slots)) != len(self._free_slots):
            raise AssertionError(f"a slot is free twice: {sorted(self._free_slots)}")
