"""What is on disk or on its way there: blocks by key, and which of them to give up next.

It does not know requests, the pool or files. Blocks form paths, each naming the one it continues; a block
without those before it is of no use, so the first to go are ends of paths, those not used for longest.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mlxd.step import StoredBlock


@dataclass(slots=True)
class _Entry:
    block: StoredBlock
    last_used: int
    stored: bool


class DiskIndex:
    """Up to `max_blocks` blocks, after `make_room`. Times are counts of uses: bigger is later."""

    def __init__(self, max_blocks: int) -> None:
        self.max_blocks = max_blocks
        self.num_stored = 0
        self._entries: dict[bytes, _Entry] = {}
        self._num_children: Counter[bytes] = Counter()
        self._ends: list[tuple[int, bytes]] = []
        """a heap of (last use, key) of stored ends of paths; also of some that no longer are"""
        self._now = 0
        self._num_found = 0

    def __len__(self) -> int:
        """Blocks there and on their way."""
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def find(self, keys: Sequence[bytes], token_ids: bytes) -> list[StoredBlock]:
        """The blocks of a path with these keys, as far as they are on disk and have these tokens, int32."""
        blocks: list[StoredBlock] = []
        get, size = self._entries.get, len(token_ids) // max(1, len(keys))
        start = 0
        for key in keys:
            entry = get(key)
            end = start + size
            if entry is None or not entry.stored or entry.block.token_ids != token_ids[start:end]:
                break
            blocks.append(entry.block)
            start = end
        return blocks

    def add_found(self, block: StoredBlock) -> None:
        """A block that was on disk before; they come last used first."""
        if block.key not in self._entries and block.key != block.parent:
            self._num_found += 1
            self._insert(block, -self._num_found, stored=True)

    def add_storing(self, block: StoredBlock) -> None:
        """A new block on its way to disk."""
        self._now += 1
        self._insert(block, self._now, stored=False)

    def mark_stored(self, key: bytes) -> bool:
        """It has arrived; False if it was removed meanwhile."""
        entry = self._entries.get(key)
        if entry is None or entry.stored:
            return False
        entry.stored = True
        self.num_stored += 1
        self._push_end(key, entry)
        return True

    def touch(self, keys: list[bytes]) -> None:
        """A path, or its beginning, was used. Unknown keys are passed over."""
        self._now = now = self._now + 1
        get, num_children = self._entries.get, self._num_children
        for key in keys:
            entry = get(key)
            if entry is not None:
                entry.last_used = now
                if key not in num_children:  # asked here too: most are not, and there may be many thousands
                    self._push_end(key, entry)

    def remove(self, key: bytes) -> bool:
        """Forget a block; False if it is not known."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return False
        self.num_stored -= entry.stored
        parent = entry.block.parent
        self._num_children[parent] -= 1
        if not self._num_children[parent]:
            del self._num_children[parent]
            above = self._entries.get(parent)
            if above is not None:
                self._push_end(parent, above)
        return True

    def remove_below(self, keys: list[bytes]) -> list[bytes]:
        """Forget blocks and all that continue them; returns all these keys. Looks at every block there is."""
        children: dict[bytes, list[bytes]] = {}
        for key, entry in self._entries.items():
            children.setdefault(entry.block.parent, []).append(key)
        removed: list[bytes] = []
        left = list(keys)
        while left:
            key = left.pop()
            left += children.pop(key, ())
            if self.remove(key):
                removed.append(key)
        return removed

    def clear(self) -> list[bytes]:
        """Forget all blocks; returns them."""
        keys = list(self._entries)
        self._entries.clear()
        self._num_children.clear()
        self._ends.clear()
        self.num_stored = 0
        return keys

    def make_room(self) -> list[bytes]:
        """Forget ends of paths until no more than max_blocks are left, as far as that goes; returns them."""
        removed: list[bytes] = []
        while len(self._entries) > self.max_blocks:
            key = self._oldest_end()
            if key is None:
                break
            self.remove(key)
            removed.append(key)
        return removed

    def _insert(self, block: StoredBlock, last_used: int, *, stored: bool) -> None:
        entry = self._entries[block.key] = _Entry(block, last_used, stored)
        self._num_children[block.parent] += 1
        self.num_stored += stored
        self._push_end(block.key, entry)

    def _push_end(self, key: bytes, entry: _Entry) -> None:
        if not entry.stored or key in self._num_children:
            return
        heapq.heappush(self._ends, (entry.last_used, key))
        if len(self._ends) > 2 * len(self._entries) + 64:
            self._ends = [
                (entry.last_used, key)
                for key, entry in self._entries.items()
                if entry.stored and key not in self._num_children
            ]
            heapq.heapify(self._ends)

    def _oldest_end(self) -> bytes | None:
        while self._ends:
            last_used, key = heapq.heappop(self._ends)
            entry = self._entries.get(key)
            if (
                entry is not None
                and entry.stored
                and entry.last_used == last_used
                and key not in self._num_children
            ):
                return key
        return None
