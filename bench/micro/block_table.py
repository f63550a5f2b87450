"""What block tables cost a step: `python -m bench.micro.block_table`. It knows no requests and no scheduler.

Tables of 512 requests, blocks of 16 tokens, contexts of 512 and 4096: the decode path (one token a row, no
row in need of a block; then every row in need of one) and a prefill chunk.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from types import ModuleType

from bench.micro.report import Case, report
from mlxd._ext import block_table as extension
from tests.reference import block_table as twin

NUM_ROWS = 512
BLOCK_SIZE = 16
CHUNK_TOKENS = 2048


class Step:
    """512 reserved tables, and the int32 columns of a plan for them."""

    def __init__(self, module: ModuleType, context_len: int) -> None:
        max_blocks_per_seq = context_len // BLOCK_SIZE + 1
        self.pool = module.BlockPool(1 + NUM_ROWS * max_blocks_per_seq, BLOCK_SIZE)
        self.tables = module.BlockTables(self.pool, NUM_ROWS, max_blocks_per_seq)
        self.slots = array("i", range(NUM_ROWS))
        self.ones = array("i", [1] * NUM_ROWS)
        self.context_lens = array("i", [context_len] * NUM_ROWS)
        self.next_block = array("i", [context_len + 1] * NUM_ROWS)
        self.reserve_rows()

    def reserve_rows(self) -> None:
        assert self.tables.reserve_rows(self.slots, self.context_lens) == NUM_ROWS

    def fill(self) -> None:
        self.tables.fill(self.slots, self.ones, self.context_lens)

    def decode(self) -> None:
        self.reserve_rows()
        self.fill()

    def turn_over(self) -> None:
        """Every request ends and another takes its slot."""
        for slot in range(NUM_ROWS):
            self.tables.release(slot)
        assert self.tables.reserve_rows(self.slots, self.next_block) == NUM_ROWS

    def check_integrity(self) -> None:
        self.tables.check_integrity()


def prefill(module: ModuleType) -> Callable[[], object]:
    pool = module.BlockPool(1 + CHUNK_TOKENS // BLOCK_SIZE, BLOCK_SIZE)
    tables = module.BlockTables(pool, 1, CHUNK_TOKENS // BLOCK_SIZE)
    slots, lens = array("i", [0]), array("i", [CHUNK_TOKENS])

    def run() -> None:
        assert tables.reserve(0, CHUNK_TOKENS)
        tables.fill(slots, lens, lens)
        tables.release(0)

    return run


def pool_pair(module: ModuleType) -> Callable[[], object]:
    pool = module.BlockPool(1 + NUM_ROWS, BLOCK_SIZE)
    return lambda: pool.decref(pool.allocate(32))


def cases() -> list[Case]:
    found = []
    for context_len in (512, 4096):
        ours, plain = Step(extension, context_len), Step(twin, context_len)
        for name, method in (
            ("reserve_rows", Step.reserve_rows),
            ("fill", Step.fill),
            ("reserve_rows + fill", Step.decode),
            ("release all, reserve again", Step.turn_over),
            ("check_integrity", Step.check_integrity),
        ):
            found.append(
                Case(
                    f"{name}, {NUM_ROWS} rows, context {context_len}",
                    method.__get__(ours),
                    method.__get__(plain),
                )
            )
    found.append(Case(f"prefill of {CHUNK_TOKENS} tokens", prefill(extension), prefill(twin)))
    found.append(Case("allocate + decref, 32 blocks", pool_pair(extension), pool_pair(twin)))
    return found


if __name__ == "__main__":
    report("micro.block_table", cases())
