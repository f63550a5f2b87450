"""The front's side of the disk tier: what is written to disk and when, and who waits for what to come back.

It does not know files or tensors, nor the worker: messages (mlxd/step.py) go to an outbox, reports come in.

Blocks are written soon after they were filled, not when they are evicted: else a restart would lose whatever
was never evicted. Both directions have budgets, so that steps hardly notice. When the disk fails or is slow,
the tier rests for a while, and the engine goes on with what is in memory.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence

from mlxd._ext.hashed_tokens import HashedTokens
from mlxd._ext.prefix_index import PrefixIndex
from mlxd.engine.disk_index import DiskIndex
from mlxd.engine.disk_restore import Restores
from mlxd.engine.kv_manager import KvManager
from mlxd.engine.request import Request
from mlxd.engine.stats import DiskStats
from mlxd.step import (
    BlocksFetched,
    BlocksFound,
    BlocksStored,
    DiskInfo,
    DiskReport,
    DiskRequest,
    ForgetStored,
    StoreBlocks,
    StoredBlock,
)

logger = logging.getLogger(__name__)

STORE_BYTES_PER_STEP = 8 << 20
MAX_STORING_BYTES = 32 << 20
"""handed to the worker and not yet on disk"""
REST_SECONDS = 60.0
"""after a failure, before the disk is tried again"""
FETCH_TIMEOUT_SECONDS = 10.0
"""after which a disk that says nothing is given up"""
READ_FAULTS = frozenset({"read", "slow"})


class DiskTier:
    """One worker's tier. `stats` outlives it."""

    def __init__(self, info: DiskInfo, block_size: int, max_offered: int, stats: DiskStats) -> None:
        self.info = info
        self.index = DiskIndex(info.max_blocks)
        self.stats = stats
        self.is_complete = False
        """whether all that was on disk at start is known"""
        self._forget_found = False
        self._block_size = block_size
        self._max_offered = max_offered
        self._outbox: list[DiskRequest] = []
        self._restores = Restores(info.block_bytes, self._outbox)
        self._restored: set[Request] = set()
        """not admitted since: they are not set aside a second time"""
        self._offered: OrderedDict[bytes, tuple[StoredBlock, int, bool]] = OrderedDict()
        """filled blocks by key, to be stored if they are still cached then: with their block ids, and whether
        they are first blocks"""
        self._num_storing = 0
        self._stores_rest_until = self._restores_rest_until = 0.0

    @property
    def num_storing(self) -> int:
        """Blocks on their way to the disk, or waiting for it."""
        return self._num_storing + len(self._offered)

    @property
    def num_restoring(self) -> int:
        """Requests that wait for the disk."""
        return len(self._restores)

    # To disk

    def offer(self, tokens: HashedTokens, first: int, block_ids: Sequence[int]) -> None:
        """Blocks `first` … of `tokens` are filled and cached."""
        parent = tokens.block_hash(first - 1)
        size = self._block_size
        for index, block_id in enumerate(block_ids, first):
            key = tokens.block_hash(index)
            if key not in self.index:
                token_ids = tokens.token_bytes(index * size, (index + 1) * size)
                self._offered[key] = StoredBlock(key, parent, token_ids), block_id, index == 0
            parent = key
        while len(self._offered) > self._max_offered:
            self._offered.popitem(last=False)
            self.stats.num_skipped_blocks += 1

    def retract(self, tokens: HashedTokens, first: int, stop: int) -> None:
        """Blocks `first` … `stop` - 1 of `tokens` cannot be trusted, nor can what continues them."""
        keys = [tokens.block_hash(index) for index in range(first, stop)]
        for key in keys:
            self._offered.pop(key, None)
        if any(key in self.index for key in keys):
            self._outbox.append(ForgetStored(tuple(self.index.remove_below(keys))))

    def store(self, cached: PrefixIndex, *, busy: bool, now: float) -> None:
        """Begin to write what was offered. `busy`: a step waits for the worker to be done with this."""
        if not self._offered or now < self._stores_rest_until:
            return
        block_bytes = self.info.block_bytes
        room = max(1, MAX_STORING_BYTES // block_bytes) - self._num_storing
        most = min(room, max(1, (STORE_BYTES_PER_STEP if busy else MAX_STORING_BYTES // 2) // block_bytes))
        chosen: list[tuple[StoredBlock, int]] = []
        while self._offered and len(chosen) < most:
            key, (block, block_id, is_first) = self._offered.popitem(last=False)
            if key in self.index:
                continue
            # Without the block before it, it could not be found.
            if not cached.is_cached_as(block_id, key) or not (is_first or block.parent in self.index):
                self.stats.num_skipped_blocks += 1
                continue
            self.index.add_storing(block)
            chosen.append((block, block_id))
        removed = self.index.make_room()
        while len(self.index) > self.index.max_blocks:
            # What is there cannot go: it is all on its way, or the beginning of what is.
            self.index.remove(chosen.pop()[0].key)
            self.stats.num_skipped_blocks += 1
        if removed:
            self.stats.num_evicted_blocks += len(removed)
            self._outbox.append(ForgetStored(tuple(removed)))
        if chosen:
            self._num_storing += len(chosen)
            blocks, block_ids = zip(*chosen, strict=True)
            self._outbox.append(StoreBlocks(blocks, block_ids))

    # And back

    def touch(self, tokens: HashedTokens, num_blocks: int) -> None:
        """The first blocks of `tokens` are used once more, wherever they were found."""
        self.index.touch([tokens.block_hash(index) for index in range(num_blocks)])

    def begin_restore(self, request: Request, tokens: HashedTokens, start: int, now: float) -> bool:
        """Whether more than the first `start` blocks of `tokens` are on disk; if so, they are read now.

        `request` then waits until `restored`, `cancel` or `expire` gives it back.
        """
        if now < self._restores_rest_until or request in self._restored or not self.index.num_stored:
            return False
        size = self._block_size
        stop = (tokens.num_tokens - 1) // size
        if start >= stop or tokens.block_hash(start) not in self.index:
            return False
        keys = [tokens.block_hash(index) for index in range(start, stop)]
        blocks = self.index.find(keys, tokens.token_bytes(start * size, stop * size))
        if not blocks:
            return False
        if self._restores.add(request, tokens, start, blocks):
            self._restored.add(request)
            self.stats.num_restores += 1
        self.touch(tokens, start + len(blocks))
        self._restores.ask(now)
        return True

    def restored(self, kv: KvManager, headroom: int, most: int, now: float) -> list[Request]:
        """Requests whose blocks are in the pool now, or will not come; `most` pieces are put there."""
        num_placed, over = self._restores.place(kv, headroom, most)
        self.stats.num_restored_tokens += num_placed * self._block_size
        self._restores.ask(now)
        return over

    def cancel(self, request: Request) -> list[Request]:
        """`request` waits no more; returns others that wait no more because of it."""
        self._restored.discard(request)
        return self._restores.cancel(request)

    def expire(self, now: float) -> list[Request]:
        """Requests that have waited too long for the disk, or do while it rests."""
        asked = self._restores.oldest_question()
        if asked is not None and now - asked >= FETCH_TIMEOUT_SECONDS:
            self.stats.errors["slow"] += 1
            self._rest_restores({"slow": 1}, now)
        return self._restores.give_up() if now < self._restores_rest_until else []

    def admitted(self, request: Request, tokens: HashedTokens, block_ids: Sequence[int]) -> None:
        """`request` runs, its first blocks found in memory. Those that the disk lost are stored again."""
        self._restored.discard(request)
        self.touch(tokens, len(block_ids))
        self.offer(tokens, 0, block_ids)

    def clear(self) -> list[Request]:
        """Delete all that is on disk; returns requests that waited for it, and need not any more."""
        self._forget_found = not self.is_complete
        self._offered.clear()
        self._outbox.append(ForgetStored(tuple(self.index.clear())))
        return self._restores.give_up()

    # With the worker

    def take_messages(self) -> list[DiskRequest]:
        """What the worker is to be told, in this order."""
        messages = self._outbox.copy()
        self._outbox.clear()
        return messages

    def on_report(self, message: DiskReport, now: float) -> None:
        self.stats.errors.update(message.errors)
        if isinstance(message, BlocksStored):
            self._on_stored(message, now)
        elif isinstance(message, BlocksFetched):
            self._on_fetched(message, now)
        else:
            self._on_found(message)

    def _on_found(self, message: BlocksFound) -> None:
        if self._forget_found:
            self._outbox.append(ForgetStored(tuple(block.key for block in message.blocks)))
        else:
            for block in message.blocks:
                self.index.add_found(block)
        if message.complete:
            self.is_complete = True
            removed = self.index.make_room()
            if removed:
                self._outbox.append(ForgetStored(tuple(removed)))

    def _on_stored(self, message: BlocksStored, now: float) -> None:
        self._num_storing -= len(message.keys) + len(message.failed)
        self.stats.num_stored_blocks += sum(map(self.index.mark_stored, message.keys))
        for key in message.failed:
            self.index.remove(key)
        if message.failed:
            self._stores_rest_until = now + REST_SECONDS
            _warn("written to", message.errors)

    def _on_fetched(self, message: BlocksFetched, now: float) -> None:
        for key in message.bad:
            self.index.remove(key)
        self._restores.on_fetched(message)
        if READ_FAULTS & message.errors.keys():
            self._rest_restores(message.errors, now)

    def _rest_restores(self, errors: dict[str, int], now: float) -> None:
        self._restores_rest_until = now + REST_SECONDS
        _warn("read from", errors)


def _warn(action: str, errors: dict[str, int]) -> None:
    logger.warning(
        "the disk tier is not %s for %g s: %s", action, REST_SECONDS, ", ".join(errors) or "no reason given"
    )
