"""What the prefix cache costs a request: `python -m bench.micro.prefix_index`. It knows no requests.

A prompt of 100,000 tokens against 10,000 cached blocks of 16 tokens (targets: match under 2 ms; insert and
evict under 1 us a block), hashing it, and where 5,000 conversations part inside one block.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from types import ModuleType

from bench.micro.report import Case, report
from mlxd._ext import block_table, hashed_tokens, prefix_index
from tests.reference import block_table as block_table_twin
from tests.reference import hashed_tokens as hashed_tokens_twin
from tests.reference import prefix_index as prefix_index_twin

BLOCK_SIZE = 16
PROMPT_TOKENS = 100_000
CACHED_BLOCKS = 10_000
BRANCHES = 5_000
TWIN_SHARE = 50
"""The twin looks at every block for each block: it gets prompt and cache this many times smaller."""
SALT = b"\0" * 16
VOCAB_SIZE = 50_000

Modules = tuple[ModuleType, ModuleType, ModuleType]
EXTENSION: Modules = (block_table, hashed_tokens, prefix_index)
TWIN: Modules = (block_table_twin, hashed_tokens_twin, prefix_index_twin)


class Cache:
    """A pool of `num_blocks` with a prompt's blocks cached."""

    def __init__(self, modules: Modules, num_tokens: int, num_blocks: int) -> None:
        self.table_module, self.hash_module, self.index_module = modules
        rng = random.Random(5)
        self.num_prompt_blocks = num_tokens // BLOCK_SIZE
        pool = self.table_module.BlockPool(1 + num_blocks, BLOCK_SIZE)
        self.tables = self.table_module.BlockTables(pool, 2, num_blocks)
        self.index = self.index_module.PrefixIndex(self.tables)
        self.token_ids = [rng.randrange(VOCAB_SIZE) for _ in range(num_tokens)]
        self.tokens = self.hashed(self.token_ids)
        self.add(self.tokens)

    def fill(self) -> Cache:
        """Cache other prompts in all blocks that are left."""
        rng = random.Random(6)
        while self.tables.pool.num_free >= 16:
            self.add(self.hashed([rng.randrange(VOCAB_SIZE) for _ in range(16 * BLOCK_SIZE)]))
        return self

    def hashed(self, token_ids: list[int]) -> object:
        tokens = self.hash_module.HashedTokens(BLOCK_SIZE, SALT)
        tokens.extend(token_ids)
        return tokens

    def add(self, tokens: object) -> None:
        assert self.tables.reserve(0, tokens.num_tokens)
        self.index.release(0, tokens, tokens.num_tokens)

    def hash(self) -> None:
        self.hashed(self.token_ids)

    def match(self) -> None:
        path, _, _ = self.index.match(self.tokens, self.tokens.num_tokens)
        assert len(path) == self.num_prompt_blocks

    def share(self) -> None:
        """A hit from beginning to end: match, share and release."""
        path, _, _ = self.index.match(self.tokens, self.tokens.num_tokens)
        self.index.share(0, path)
        self.index.release(0, self.tokens, 0)

    def turn_over(self) -> None:
        """Evict every block and cache the prompt's anew."""
        self.index.evict(self.index.num_cached)
        self.add(self.tokens)


def branches(modules: Modules, count: int) -> Callable[[], object]:
    """Match a prompt whose second block parts from `count` others inside it."""
    cache = Cache(modules, BLOCK_SIZE, count + 4)
    rng = random.Random(7)
    head = [*cache.token_ids, 1, 2, 3, 4, 5]
    rest = 2 * BLOCK_SIZE - len(head)
    for _ in range(count):
        cache.add(cache.hashed(head + [rng.randrange(VOCAB_SIZE) for _ in range(rest)]))
    asked = cache.hashed(head + [0] * rest)
    return lambda: cache.index.match(asked, asked.num_tokens)


def cases() -> list[Case]:
    ours = Cache(EXTENSION, PROMPT_TOKENS, CACHED_BLOCKS).fill()
    plain = Cache(TWIN, PROMPT_TOKENS // TWIN_SHARE, CACHED_BLOCKS // TWIN_SHARE).fill()
    what = f"{PROMPT_TOKENS} tokens (twin: a {TWIN_SHARE}th)"
    return [
        Case(f"hash {what}", ours.hash, plain.hash),
        Case(f"match {what} in {CACHED_BLOCKS} blocks", ours.match, plain.match),
        Case("match, share, release the same", ours.share, plain.share),
        Case(f"evict and insert its {ours.num_prompt_blocks} blocks", ours.turn_over, plain.turn_over),
        Case(
            f"match where {BRANCHES} (twin: a {TWIN_SHARE}th) part in a block",
            branches(EXTENSION, BRANCHES),
            branches(TWIN, BRANCHES // TWIN_SHARE),
        ),
    ]


if __name__ == "__main__":
    report("micro.prefix_index", cases())
