"""The twin of mlxd._ext.prefix_index: a dictionary of cached blocks and a list in the order of last use.

It does not know the extension, and finds everything by looking at every block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mlxd._ext import IntegrityError
from tests.reference.block_table import BlockTables
from tests.reference.hashed_tokens import HashedTokens


@dataclass(frozen=True, slots=True)
class CachedBlock:
    salt: tuple[int, int]
    parent: int
    token_ids: tuple[int, ...]


def common_length(one: Iterable[int], other: Iterable[int]) -> int:
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return length


class PrefixIndex:
    def __init__(self, tables: BlockTables) -> None:
        self.tables = tables
        self.pool = tables.pool
        self.block_size = tables.pool.block_size
        self.blocks: dict[int, CachedBlock] = {}
        self.queue: list[int] = []
        self.evicted: set[bytes] = set()
        self.published = [0] * tables.max_num_seqs
        self.shared = [0] * tables.max_num_seqs

    @property
    def num_cached(self) -> int:
        return len(self.blocks)

    @property
    def num_evictable(self) -> int:
        return len(self.queue)

    def match(self, tokens: HashedTokens, max_tokens: int) -> tuple[list[int], int, int]:
        self._check_tokens(tokens, max_tokens)
        path: list[int] = []
        while (len(path) + 1) * self.block_size <= max_tokens:
            parent = path[-1] if path else 0
            block_id = self._find(CachedBlock(tokens.salt, parent, tuple(tokens.block(len(path)))))
            if block_id == 0:
                break
            path.append(block_id)
        start = len(path) * self.block_size
        rest = tokens.tokens[start : min(start + self.block_size, max_tokens)]
        nearest, num_common = self._closest(tokens.salt, path[-1] if path else 0, rest)
        return path, nearest, num_common

    def was_evicted(self, tokens: HashedTokens, index: int) -> bool:
        return 0 <= index < tokens.num_blocks and tokens.block_hash(index) in self.evicted

    def block_tokens(self, block_id: int) -> list[int]:
        return list(self._cached(block_id).token_ids)

    def is_cached_as(self, block_id: int, block_hash: bytes) -> bool:
        block = self.blocks.get(block_id)
        if block is None or len(block.token_ids) < self.block_size:
            return False
        return self._chain(block).block_hash(self._depth(block)) == block_hash

    def share(self, slot: int, block_ids: Sequence[int]) -> None:
        if self.tables.block_ids(slot):
            raise ValueError(f"slot {slot} has blocks already")
        self._check_path(block_ids)
        self.tables.share(slot, block_ids)
        self._unqueue(block_ids)
        self.published[slot] = self.shared[slot] = len(block_ids)

    def adopt(self, slot: int, block_id: int, num_tokens: int) -> bool:
        table = self.tables.block_ids(slot)
        block = self._cached(block_id)
        if self.published[slot] != len(table) or (table[-1] if table else 0) != block.parent:
            raise ValueError(f"slot {slot}: block {block_id} does not continue its path")
        if not len(block.token_ids) == num_tokens < self.block_size or block_id not in self.queue:
            return False
        if len(table) == self.tables.max_blocks_per_seq:
            raise ValueError(f"slot {slot}: no room")
        self._unqueue([block_id])
        del self.blocks[block_id]
        self.tables.tables[slot].append(block_id)
        return True

    def publish(self, slot: int, tokens: HashedTokens, num_tokens: int) -> None:
        self._check_tokens(tokens, num_tokens)
        if num_tokens > len(self.tables.block_ids(slot)) * self.block_size:
            raise ValueError(f"slot {slot}: the table does not cover {num_tokens} tokens")
        table = self.tables.tables[slot]
        while self._has_path(slot) and (self.published[slot] + 1) * self.block_size <= num_tokens:
            index = self.published[slot]
            block = CachedBlock(tokens.salt, self._end(slot), tuple(tokens.block(index)))
            existing = self._find(block)
            if existing == 0:
                self._insert(table[index], block)
            elif existing != table[index]:
                self.pool.incref([existing])
                self._unqueue([existing])
                self.pool.decref([table[index]])
                table[index] = existing
            self.published[slot] += 1

    def release(self, slot: int, tokens: HashedTokens, num_tokens: int) -> None:
        self.publish(slot, tokens, num_tokens)
        table = self.tables.tables[slot]
        index = self.published[slot]
        rest = tuple(tokens.tokens[index * self.block_size : num_tokens])
        if 0 < len(rest) < self.block_size and self._has_path(slot):
            block = CachedBlock(tokens.salt, self._end(slot), rest)
            if self._closest(tokens.salt, block.parent, rest)[1] < len(rest):
                self._insert(table[index], block)
        for block_id in reversed(table):
            self._drop(block_id)
        table.clear()
        self.published[slot] = self.shared[slot] = 0

    def discard(self, slot: int) -> int:
        table = self.tables.block_ids(slot)
        before = len(self.blocks)
        if self.shared[slot] < self.published[slot]:
            self._forget_below(table[self.shared[slot]])
        self.published[slot] = -1
        return before - len(self.blocks)

    def touch(self, block_id: int) -> None:
        if self._cached(block_id).parent in self.queue:
            raise ValueError(f"block {block_id} continues one that nobody holds")
        if block_id in self.queue:
            self.queue.remove(block_id)
            self.queue.append(block_id)

    def hold(self, block_ids: Sequence[int]) -> None:
        self._check_path(block_ids)
        self.pool.incref(block_ids)
        self._unqueue(block_ids)

    def unhold(self, block_ids: Sequence[int]) -> None:
        for block_id in block_ids:
            if self.pool.ref_cnt(block_id) < 1 + (block_id in self.blocks):
                raise ValueError(f"nobody holds block {block_id}")
        for block_id in reversed(block_ids):
            self._drop(block_id)

    def evict(self, n: int) -> int:
        victims = self.queue[: max(n, 0)]
        for block_id in victims:
            block = self.blocks[block_id]
            if len(block.token_ids) == self.block_size:
                self.evicted.add(self._chain(block).block_hash(self._depth(block)))
            assert block_id not in {other.parent for other in self.blocks.values()}, "not a leaf"
            self.queue.remove(block_id)
            del self.blocks[block_id]
            self.pool.decref([block_id])
        return len(victims)

    def check_integrity(self, held: Mapping[int, int] | None = None) -> None:
        owned = dict(held or {})
        for block_id, block in self.blocks.items():
            owned[block_id] = owned.get(block_id, 0) + 1
            if block.parent and len(self._cached(block.parent).token_ids) != self.block_size:
                raise IntegrityError(f"block {block_id} continues a block that is not full")
            if (block_id in self.queue) != (self.pool.ref_cnt(block_id) == 1):
                raise IntegrityError(f"block {block_id} is on the wrong side of the queue")
        if len(set(self.queue)) != len(self.queue):
            raise IntegrityError(f"a block is twice in the queue {self.queue}")
        self.tables.check_integrity(owned)

    # The extension keeps trees and hashes for what these look up by going through all blocks.

    def _find(self, wanted: CachedBlock) -> int:
        return next((block_id for block_id, block in self.blocks.items() if block == wanted), 0)

    def _closest(self, salt: tuple[int, int], parent: int, rest: Sequence[int]) -> tuple[int, int]:
        best = (0, 0)
        for block_id, block in self.blocks.items():
            if (block.salt, block.parent) == (salt, parent):
                length = common_length(block.token_ids, rest)
                if best[0] == 0 or length > best[1]:
                    best = (block_id, length)
        return best

    def _chain(self, block: CachedBlock) -> HashedTokens:
        chain = HashedTokens(self.block_size, b"\0" * 16)
        chain.hashes = [block.salt]
        path = [block]
        while path[-1].parent:
            path.append(self.blocks[path[-1].parent])
        for each in reversed(path):
            chain.extend(each.token_ids)
        return chain

    def _depth(self, block: CachedBlock) -> int:
        depth = 0
        while block.parent:
            block = self.blocks[block.parent]
            depth += 1
        return depth

    def _insert(self, block_id: int, block: CachedBlock) -> None:
        self.blocks[block_id] = block
        self.pool.incref([block_id])

    def _drop(self, block_id: int) -> None:
        self.pool.decref([block_id])
        if block_id in self.blocks and self.pool.ref_cnt(block_id) == 1:
            self.queue.append(block_id)

    def _unqueue(self, block_ids: Sequence[int]) -> None:
        self.queue = [block_id for block_id in self.queue if block_id not in block_ids]

    def _forget_below(self, block_id: int) -> None:
        if block_id not in self.blocks:
            return
        for child in [c for c, block in self.blocks.items() if block.parent == block_id]:
            self._forget_below(child)
        self._unqueue([block_id])
        del self.blocks[block_id]
        self.pool.decref([block_id])

    def _end(self, slot: int) -> int:
        index = self.published[slot]
        return self.tables.block_ids(slot)[index - 1] if index else 0

    def _has_path(self, slot: int) -> bool:
        return self.published[slot] == 0 or (self.published[slot] > 0 and self._end(slot) in self.blocks)

    def _cached(self, block_id: int) -> CachedBlock:
        if block_id not in self.blocks:
            raise ValueError(f"block {block_id} is not cached")
        return self.blocks[block_id]

    def _check_tokens(self, tokens: HashedTokens, num_tokens: int) -> None:
        if tokens.block_size != self.block_size or not 0 <= num_tokens <= tokens.num_tokens:
            raise ValueError(f"{num_tokens} tokens")

    def _check_path(self, block_ids: Sequence[int]) -> None:
        for parent, block_id in zip([0, *block_ids], block_ids, strict=False):
            block = self._cached(block_id)
            if block.parent != parent or len(block.token_ids) != self.block_size:
                raise ValueError(f"block {block_id} does not continue block {parent}")
