"""Requests that wait for stored blocks to be read, and how far each has come.

It does not know how blocks are found or stored. Reading goes on beside the steps of others: a request is set
aside until its blocks are in the pool, and is then admitted like one whose blocks never left.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from mlxd._ext.hashed_tokens import HashedTokens
from mlxd.engine.kv_manager import KvManager
from mlxd.engine.request import Request
from mlxd.step import BlocksFetched, DiskRequest, FetchBlocks, PlaceBlocks, StoredBlock

FETCH_BYTES = 8 << 20
"""read in one piece, and put into the pool between two steps"""
MAX_FETCHES = 4
"""pieces that are being read, or wait in memory for their place"""


@dataclass(slots=True, eq=False)
class _Fetch:
    fetch_id: int
    first: int
    """index among the request's blocks"""
    num_blocks: int
    asked_at: float
    num_read: int | None = None


@dataclass(slots=True, eq=False)
class _Restore:
    """Blocks `start` … of a request, which is the first of `waiting`; the others want the same."""

    waiting: list[Request]
    tokens: HashedTokens
    start: int
    blocks: list[StoredBlock]
    num_asked: int = 0
    is_over: bool = False
    fetches: deque[_Fetch] = field(default_factory=deque)
    """in order"""


class Restores:
    """Reads for one request after another. What the worker is to do is appended to `outbox`, in order.

    `block_bytes` is what a stored block takes.
    """

    def __init__(self, block_bytes: int, outbox: list[DiskRequest]) -> None:
        self._outbox = outbox
        self._blocks_per_fetch = max(1, FETCH_BYTES // block_bytes)
        self._next_fetch_id = 0
        self._restores: list[_Restore] = []
        self._fetches: dict[int, _Fetch] = {}
        """asked for, not placed, and wanted"""

    def __len__(self) -> int:
        """Requests that wait."""
        return sum(len(restore.waiting) for restore in self._restores)

    def add(self, request: Request, tokens: HashedTokens, start: int, blocks: list[StoredBlock]) -> bool:
        """Have `blocks`, which continue the first `start` of `tokens`, read for `request`.

        False if they are being read already: then the request waits for that.
        """
        for restore in self._restores:
            place = start - restore.start
            if 0 <= place < len(restore.blocks) and restore.blocks[place].key == blocks[0].key:
                restore.waiting.append(request)
                return False
        self._restores.append(_Restore([request], tokens, start, blocks))
        return True

    def ask(self, now: float) -> None:
        """For what is to be read next, as far as there is memory for it."""
        for restore in self._restores:
            while len(self._fetches) < MAX_FETCHES and restore.num_asked < len(restore.blocks):
                first = restore.num_asked
                blocks = tuple(restore.blocks[first : first + self._blocks_per_fetch])
                fetch = _Fetch(self._next_fetch_id, first, len(blocks), now)
                self._next_fetch_id += 1
                restore.num_asked += len(blocks)
                restore.fetches.append(fetch)
                self._fetches[fetch.fetch_id] = fetch
                self._outbox.append(FetchBlocks(fetch.fetch_id, blocks))

    def on_fetched(self, message: BlocksFetched) -> None:
        fetch = self._fetches.get(message.fetch_id)
        if fetch is None:
            self._outbox.append(PlaceBlocks(message.fetch_id))
        else:
            fetch.num_read = min(message.num_blocks, fetch.num_blocks)

    def place(self, kv: KvManager, headroom: int, most: int) -> tuple[int, list[Request]]:
        """Put what was read into the pool, `most` pieces; leave `headroom` blocks free or evictable.

        Returns how many blocks were placed, and the requests whose waiting is over.
        """
        num_placed = 0
        for restore in self._restores:
            fetches = restore.fetches
            while most and fetches and fetches[0].num_read is not None and not restore.is_over:
                fetch = fetches.popleft()
                del self._fetches[fetch.fetch_id]
                first = restore.start + fetch.first
                block_ids = kv.restore(restore.tokens, first, first + (fetch.num_read or 0), headroom)
                self._outbox.append(PlaceBlocks(fetch.fetch_id, tuple(block_ids)))
                num_placed += sum(map(bool, block_ids))
                most -= 1
                is_last = not fetches and restore.num_asked == len(restore.blocks)
                restore.is_over = is_last or len(block_ids) < fetch.num_blocks
        return num_placed, self._take_over()

    def cancel(self, request: Request) -> list[Request]:
        """`request` waits no more; returns others that wait no more because of it."""
        for restore in self._restores:
            if request in restore.waiting:
                restore.is_over = restore.waiting[0] is request
                restore.waiting.remove(request)
                break
        return self._take_over()

    def give_up(self) -> list[Request]:
        """Nobody waits any more; returns who did."""
        for restore in self._restores:
            restore.is_over = True
        return self._take_over()

    def oldest_question(self) -> float | None:
        """When that was asked for which has not been read for longest."""
        unread = (fetch.asked_at for fetch in self._fetches.values() if fetch.num_read is None)
        return min(unread, default=None)

    def _take_over(self) -> list[Request]:
        """Who waited for what is over now."""
        over = [restore for restore in self._restores if restore.is_over]
        for restore in over:
            self._restores.remove(restore)
            for fetch in restore.fetches:
                del self._fetches[fetch.fetch_id]
                if fetch.num_read is not None:
                    self._outbox.append(PlaceBlocks(fetch.fetch_id))
        return [request for restore in over for request in restore.waiting]
