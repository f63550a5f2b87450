"""The worker's side of the disk tier: blocks out of the pool and in again, files in threads of their own.

It does not know MLX or what is worth storing: the front says, by messages (mlxd/step.py). The worker's main
thread only copies between the pool and memory, in order with the steps. One thread writes and deletes, one
reads, so that neither a step nor a read waits for writes.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Protocol

import numpy as np

from mlxd.step import (
    NULL_BLOCK,
    BlocksFetched,
    BlocksFound,
    BlocksStored,
    DiskInfo,
    DiskRequest,
    FetchBlocks,
    ForgetStored,
    Message,
    PlaceBlocks,
    StoreBlocks,
    StoredBlock,
)
from mlxd.worker.disk.block_file import BlockFileError, Bytes, Fault
from mlxd.worker.disk.folder import BlockFolder

logger = logging.getLogger(__name__)

FOUND_BLOCKS = 512
"""in a message; the front takes one in about a millisecond"""
STOP_SECONDS = 3.0
SLOW_SECONDS = 2.0
"""for one FetchBlocks, after which the front is told that the disk is of little help"""
WRITER_NICENESS = 10
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class BlockMover(Protocol):
    """Who has the pool. A block's bytes are those of all layers, in an order of its own."""

    def read_blocks(self, block_ids: Sequence[int]) -> Callable[[], Bytes]:
        """Copy blocks as they are after what was launched so far.

        What comes back waits for the copy, uint8 [n, payload_bytes].
        """

    def write_blocks(self, block_ids: Sequence[int], payload: Bytes) -> None:
        """Overwrite blocks, before whatever is launched next, with uint8 [n, payload_bytes]."""


class DiskTier:
    """Implements step_loop.StoredBlocks over an open folder. `send` must be safe to call from any thread."""

    def __init__(
        self,
        folder: BlockFolder,
        mover: BlockMover,
        send: Callable[[Message], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._mover = mover
        self._send = send
        self._clock = clock
        self._copying: deque[tuple[StoreBlocks | ForgetStored, Callable[[], Bytes] | None]] = deque()
        """on the way to the writer, in the order of their messages"""
        self._to_write: SimpleQueue[tuple[StoreBlocks | ForgetStored, Bytes | None] | None] = SimpleQueue()
        self._to_read: SimpleQueue[FetchBlocks | None] = SimpleQueue()
        self._fetched: dict[int, Bytes] = {}
        self._failing = False
        self._threads = [
            threading.Thread(target=self._run, args=(work,), name=name, daemon=True)
            for name, work in (("disk-writer", self._write_all), ("disk-reader", self._read_all))
        ]

    @property
    def info(self) -> DiskInfo:
        folder = self._folder
        return DiskInfo(folder.max_blocks, folder.block_bytes, folder.seed)

    def start(self) -> None:
        """Report what is there, then do as told. To be called after WorkerReady was sent."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Finish writing what was taken, for STOP_SECONDS at most, and give the folder up."""
        self._to_write.put(None)
        self._to_read.put(None)
        for thread in self._threads:
            thread.join(STOP_SECONDS)
        self._folder.close()

    def handle(self, message: DiskRequest) -> None:
        if isinstance(message, StoreBlocks):
            self._copying.append((message, self._mover.read_blocks(message.block_ids)))
        elif isinstance(message, ForgetStored):
            self._copying.append((message, None))
        elif isinstance(message, FetchBlocks):
            self._to_read.put(message)
        else:
            self._place(message)

    def collect(self) -> None:
        while self._copying:
            message, wait = self._copying.popleft()
            self._to_write.put((message, None if wait is None else wait()))

    def _place(self, message: PlaceBlocks) -> None:
        payload = self._fetched.pop(message.fetch_id)
        wanted = [index for index, block_id in enumerate(message.block_ids) if block_id != NULL_BLOCK]
        if wanted:
            # What is not wanted are leading blocks, so this is a view.
            rows = payload[wanted[0] : wanted[-1] + 1]
            self._mover.write_blocks(message.block_ids[wanted[0] : wanted[-1] + 1], rows)

    # The threads

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError:
            # Sending failed: the front is gone, and the main thread notices it too.
            logger.debug("the disk tier has nobody to report to")

    def _write_all(self) -> None:
        if sys.platform == "linux":
            # There, threads have a niceness of their own: checksums wait for the model, not it for them.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), WRITER_NICENESS)
        self._report_found()
        while (item := self._to_write.get()) is not None:
            message, payload = item
            if isinstance(message, ForgetStored):
                for key in message.keys:
                    self._folder.remove(key)
            else:
                assert payload is not None
                self._send(self._store(message.blocks, payload))

    def _report_found(self) -> None:
        faults: list[Fault] = []
        blocks: list[StoredBlock] = []
        for block in self._folder.scan(faults):
            blocks.append(block)
            if len(blocks) == FOUND_BLOCKS:
                self._send(BlocksFound(tuple(blocks), False))
                blocks.clear()
        self._send(BlocksFound(tuple(blocks), True, _count(faults)))

    def _store(self, blocks: Sequence[StoredBlock], payload: Bytes) -> BlocksStored:
        num_stored = 0
        try:
            for block, row in zip(blocks, payload, strict=True):
                self._folder.write(block, row)
                num_stored += 1
        except OSError as error:
            if not self._failing:
                logger.warning("blocks cannot be written to cache.disk_path: %s", error)
            self._failing = True
            fault = Fault.FULL if error.errno in NO_SPACE else Fault.WRITE
            errors = {fault.value: 1}
        else:
            self._failing = False
            errors = {}
        keys = tuple(block.key for block in blocks)
        return BlocksStored(keys[:num_stored], keys[num_stored:], errors)

    def _read_all(self) -> None:
        while (message := self._to_read.get()) is not None:
            payload = np.empty((len(message.blocks), self._folder.format.payload_bytes), dtype=np.uint8)
            num_read = 0
            faults: list[Fault] = []
            began = self._clock()
            bad: tuple[bytes, ...] = ()
            try:
                for block, row in zip(message.blocks, payload, strict=True):
                    self._folder.read(block, row)
                    num_read += 1
            except BlockFileError as error:
                if error.fault is not Fault.MISSING:
                    logger.warning("a stored block is %s; it is deleted", error.fault)
                faults.append(error.fault)
                bad = (message.blocks[num_read].key,)
                self._to_write.put((ForgetStored(bad), None))
            if self._clock() - began > SLOW_SECONDS:
                faults.append(Fault.SLOW)
            self._fetched[message.fetch_id] = payload[:num_read]
            self._send(BlocksFetched(message.fetch_id, num_read, bad, _count(faults)))


def _count(faults: Sequence[Fault]) -> dict[str, int]:
    return dict(Counter(fault.value for fault in faults))
