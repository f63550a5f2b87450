"""Stored blocks in files: whatever happens to a file, no wrong byte comes out of it, and all is counted."""

from __future__ import annotations

import errno
import os
import random
import stat
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from queue import Queue

import numpy as np
import pytest

from mlxd.config import CacheConfig
from mlxd.step import (
    BlocksFetched,
    BlocksFound,
    BlocksStored,
    FetchBlocks,
    ForgetStored,
    Message,
    PlaceBlocks,
    StoreBlocks,
    StoredBlock,
)
from mlxd.worker.disk.block_file import BlockFileError, BlockFormat, Bytes, Fault
from mlxd.worker.disk.folder import FOLDER, BlockFolder, DiskTierError
from mlxd.worker.disk.open import fingerprint, open_disk_tier
from mlxd.worker.disk.tier import DiskTier

BLOCK_SIZE = 4
FORMAT = BlockFormat(fingerprint({"model": "tiny"}), BLOCK_SIZE, 640)
NUM_DAMAGED = int(os.environ.get("MLXD_DAMAGED_FILES", "1000"))


def block(number: int) -> StoredBlock:
    return StoredBlock(
        number.to_bytes(16, "big"),
        (number // 2).to_bytes(16, "big"),
        np.arange(number, number + BLOCK_SIZE, dtype=np.int32).tobytes(),
    )


def payload(number: int) -> Bytes:
    return np.random.default_rng(number).integers(0, 256, FORMAT.payload_bytes, dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[BlockFolder]:
    folder = BlockFolder(tmp_path, FORMAT, 1 << 30)
    folder.open()
    yield folder
    folder.close()


def reopened(folder: BlockFolder, **changes: object) -> BlockFolder:
    folder.close()
    again = BlockFolder(folder.root, replace(folder.format, **changes), folder.max_bytes)  # type: ignore[arg-type]
    again.open()
    return again


def read(folder: BlockFolder, number: int) -> Bytes:
    data = np.zeros(FORMAT.payload_bytes, dtype=np.uint8)
    folder.read(block(number), data)
    return data


def fault_of(folder: BlockFolder, number: int) -> Fault:
    with pytest.raises(BlockFileError) as caught:
        read(folder, number)
    return caught.value.fault


def test_what_was_written_is_read(folder: BlockFolder) -> None:
    for number in range(5):
        folder.write(block(number), payload(number))
    again = reopened(folder)
    assert again.seed == folder.seed != b""
    for number in range(5):
        assert (read(again, number) == payload(number)).all()
    assert fault_of(again, 5) is Fault.MISSING
    faults: list[Fault] = []
    assert sorted(found.key for found in again.scan(faults)) == [block(number).key for number in range(5)]
    assert not faults
    again.close()


def test_nobody_else_can_read(folder: BlockFolder) -> None:
    folder.write(block(1), payload(1))
    for path in [folder.root / FOLDER, *(folder.root / FOLDER).rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_last_used_is_found_first(folder: BlockFolder) -> None:
    for number in range(4):
        folder.write(block(number), payload(number))
        os.utime(folder.path(block(number).key), (number, number))
    read(folder, 1)
    again = reopened(folder)
    assert [found.key for found in again.scan([])] == [block(number).key for number in (1, 3, 2, 0)]
    again.close()


def damage(rng: random.Random, folder: BlockFolder, number: int, numbers: Sequence[int]) -> None:
    """Do something to the file of block `number` that must not go unnoticed."""
    path = folder.path(block(number).key)
    data = bytearray(path.read_bytes())
    match rng.randrange(8):
        case 0 | 1 | 2:
            for _ in range(rng.choice((1, 1, 2, 50))):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 3:
            data = data[: rng.randrange(len(data))]
        case 4:
            data += bytes(rng.randrange(1, 100))
        case 5:
            other = rng.choice([n for n in numbers if n != number])
            data = bytearray(folder.format.file_bytes)
            data[:] = foreign_or_other(rng, folder, other)
        case 6:
            start = rng.randrange(len(data) - 64)
            part = bytes(64)
            data[start : start + 64] = part if data[start : start + 64] != part else b"x" * 64
        case 7:
            path.unlink()
            return
    path.write_bytes(data)


def foreign_or_other(rng: random.Random, folder: BlockFolder, other: int) -> bytes:
    """An intact file: another block's, or this model's namesake's."""
    changes = rng.choice(({}, {"fingerprint": fingerprint({"model": "other"})}))
    made = folder.root / "made"
    made.unlink(missing_ok=True)
    replace(folder.format, **changes).write(made, block(other), payload(other))
    return made.read_bytes()


def test_damaged_files_give_no_wrong_byte_and_are_all_counted(folder: BlockFolder) -> None:
    rng = random.Random(1)
    num_files = 50
    counted: Counter[Fault] = Counter()
    for _ in range(NUM_DAMAGED // num_files):
        for number in range(num_files):
            folder.write(block(number), payload(number))
        originals = {number: folder.path(block(number).key).read_bytes() for number in range(num_files)}
        for number in range(num_files):
            damage(rng, folder, number, range(num_files))
        for number in range(num_files):
            path = folder.path(block(number).key)
            if path.exists() and path.read_bytes() == originals[number]:
                continue  # two flips of one bit
            counted[fault_of(folder, number)] += 1
    assert counted.total() > 0.98 * NUM_DAMAGED
    assert set(counted) == {Fault.DAMAGED, Fault.TRUNCATED, Fault.FOREIGN, Fault.MISPLACED, Fault.MISSING}


def test_a_scan_removes_what_is_no_block_of_ours_and_nothing_else(folder: BlockFolder) -> None:
    for number in range(12):
        folder.write(block(number), payload(number))
    paths = [folder.path(block(number).key) for number in range(12)]
    paths[0].write_bytes(b"")
    paths[1].write_bytes(paths[1].read_bytes()[:100])
    paths[2].write_bytes(paths[3].read_bytes())
    head = bytearray(paths[4].read_bytes())
    head[20] ^= 1
    paths[4].write_bytes(head)
    paths[5].write_bytes(foreign_or_other(random.Random(0), folder, 5))
    paths[6].with_suffix(".part").write_bytes(b"half")
    strangers = [folder.folder / "README", folder.root / FOLDER / "notes.txt", folder.folder / "abc.kv"]
    for stranger in strangers:
        stranger.write_text("not ours")
    again = reopened(folder)
    faults: list[Fault] = []
    found = {block.key for block in again.scan(faults)}
    assert found >= {block(number).key for number in range(6, 12)} | {block(3).key}
    assert not found & {block(number).key for number in (0, 1, 2, 4)}
    assert Counter(faults) >= Counter({Fault.TRUNCATED: 2, Fault.MISPLACED: 1, Fault.DAMAGED: 1})
    assert all(stranger.exists() for stranger in strangers)
    assert not paths[0].exists() and not paths[6].with_suffix(".part").exists()
    again.close()


def test_a_pipe_or_a_link_in_place_of_a_file_is_no_block(folder: BlockFolder) -> None:
    folder.write(block(1), payload(1))
    os.mkfifo(folder.path(block(2).key))
    folder.path(block(3).key).symlink_to(folder.path(block(1).key))
    folder.path(block(4).key).mkdir()
    assert fault_of(folder, 2) is Fault.TRUNCATED
    assert fault_of(folder, 3) is Fault.READ
    assert fault_of(folder, 4) in (Fault.TRUNCATED, Fault.READ)


def test_another_model_has_a_folder_of_its_own_and_makes_room(folder: BlockFolder) -> None:
    for number in range(4):
        folder.write(block(number), payload(number))
        os.utime(folder.path(block(number).key), (number, number))
    folder.max_bytes = 5 * folder.block_bytes
    other = reopened(folder, fingerprint=fingerprint({"model": "other"}))
    assert list(other.scan([])) == []
    other.write(block(10), payload(10))
    assert len(list(folder.folder.iterdir())) == 4
    other.write(block(11), payload(11))
    other.write(block(12), payload(12))
    # The limit holds for all together, and what was used longest ago has gone.
    left = sorted(path.name for path in folder.folder.iterdir())
    assert left == [folder.path(block(number).key).name for number in (2, 3)]
    other.close()


def test_one_server_at_a_time(folder: BlockFolder) -> None:
    now = iter(range(100))
    with pytest.raises(DiskTierError, match="in use by another server"):
        BlockFolder(folder.root, FORMAT, 1 << 30).open(lambda: float(next(now)))
    reopened(folder).close()


def test_a_lost_salt_makes_everything_unfindable_not_wrong(folder: BlockFolder) -> None:
    folder.write(block(1), payload(1))
    (folder.root / FOLDER / "salt").write_bytes(b"short")
    again = reopened(folder)
    assert again.seed != folder.seed
    assert reopened(again).seed == again.seed


def open_tier(path: Path, max_gb: float = 1.0) -> tuple[DiskTier | None, tuple[str, ...]]:
    config = CacheConfig(disk_path=str(path), disk_max_gb=max_gb, block_size=BLOCK_SIZE)
    return open_disk_tier(config, {}, block_bytes=640, mover=Pool(), send=lambda _: None)


def test_a_folder_that_cannot_be_had_is_a_warning_without_a_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    tier, warnings = open_tier(tmp_path / "file" / "below")
    assert tier is None
    assert warnings == ("the prefix cache has no disk tier: cache.disk_path cannot be used: Not a directory",)
    tier, warnings = open_tier(tmp_path, max_gb=1e-6)
    assert tier is None
    assert "allows 1000 bytes, and a block takes 4096" in warnings[0]


class Pool:
    """A pool of numbers: block n is full of contents[n]."""

    def __init__(self) -> None:
        self.blocks: dict[int, Bytes] = {}

    def read_blocks(self, block_ids: Sequence[int]) -> Callable[[], Bytes]:
        copied = np.stack([self.blocks[block_id] for block_id in block_ids])
        return lambda: copied

    def write_blocks(self, block_ids: Sequence[int], payload: Bytes) -> None:
        assert len(block_ids) == len(payload)
        self.blocks |= dict(zip(block_ids, payload.copy(), strict=True))


class Tier:
    """A tier and what it says."""

    def __init__(self, folder: BlockFolder) -> None:
        self.pool = Pool()
        self.said: Queue[Message] = Queue()
        self.tier = DiskTier(folder, self.pool, self.said.put)
        self.tier.start()

    def tell(self, message: StoreBlocks | FetchBlocks | PlaceBlocks | ForgetStored) -> None:
        self.tier.handle(message)
        self.tier.collect()

    def hear(self) -> Message:
        return self.said.get(timeout=10)


def tier_threads() -> list[str]:
    """Those of any tier that still run."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("disk-")]


@pytest.fixture
def tier(folder: BlockFolder) -> Iterator[Tier]:
    made = Tier(folder)
    assert made.hear() == BlocksFound((), True)
    yield made
    made.tier.stop()
    assert tier_threads() == []


def stored(tier: Tier, numbers: Sequence[int]) -> None:
    tier.pool.blocks |= {number: payload(number) for number in numbers}
    blocks = tuple(block(number) for number in numbers)
    tier.tell(StoreBlocks(blocks, tuple(numbers)))
    assert tier.hear() == BlocksStored(tuple(each.key for each in blocks))


def test_blocks_go_out_and_come_back(tier: Tier) -> None:
    stored(tier, range(1, 7))
    tier.tell(FetchBlocks(1, tuple(block(number) for number in range(1, 7))))
    assert tier.hear() == BlocksFetched(1, 6)
    tier.tell(PlaceBlocks(1, (0, 0, 23, 24, 25)))
    assert sorted(tier.pool.blocks) == [1, 2, 3, 4, 5, 6, 23, 24, 25]
    for number in (3, 4, 5):
        assert (tier.pool.blocks[20 + number] == payload(number)).all()


def test_a_read_ends_at_what_is_damaged(tier: Tier, folder: BlockFolder) -> None:
    stored(tier, range(1, 7))
    path = folder.path(block(4).key)
    path.write_bytes(path.read_bytes()[:-1])
    wanted = tuple(block(number) for number in range(1, 7))
    tier.tell(FetchBlocks(1, wanted))
    assert tier.hear() == BlocksFetched(1, 3, (block(4).key,), {"truncated": 1})
    tier.tell(PlaceBlocks(1, ()))
    stored(tier, [9])  # by then the bad file is gone
    assert not path.exists()
    tier.tell(FetchBlocks(2, wanted[3:]))
    assert tier.hear() == BlocksFetched(2, 0, (block(4).key,), {"missing": 1})


def test_what_is_forgotten_while_it_is_stored_is_gone(tier: Tier, folder: BlockFolder) -> None:
    tier.pool.blocks[1] = payload(1)
    tier.tier.handle(StoreBlocks((block(1),), (1,)))
    tier.tier.handle(ForgetStored((block(1).key,)))
    tier.tier.collect()
    assert tier.hear() == BlocksStored((block(1).key,))
    stored(tier, [2])
    assert [path.name for path in folder.folder.iterdir()] == [folder.path(block(2).key).name]


@pytest.mark.parametrize(
    ("error", "kind"), [(errno.ENOSPC, "full"), (errno.EDQUOT, "full"), (errno.EIO, "write")]
)
def test_a_failing_disk_is_reported_and_leaves_no_halves(
    tier: Tier, folder: BlockFolder, monkeypatch: pytest.MonkeyPatch, error: int, kind: str
) -> None:
    num_writes = 0
    write = os.writev

    def failing(descriptor: int, parts: list[memoryview]) -> int:
        nonlocal num_writes
        num_writes += 1
        if num_writes == 4:
            raise OSError(error, os.strerror(error))
        return write(descriptor, [memoryview(parts[0])[:50]] if num_writes == 3 else parts)

    monkeypatch.setattr(os, "writev", failing)
    tier.pool.blocks |= {number: payload(number) for number in range(1, 5)}
    tier.tell(StoreBlocks(tuple(block(number) for number in range(1, 5)), (1, 2, 3, 4)))
    keys = [block(number).key for number in range(1, 5)]
    assert tier.hear() == BlocksStored(tuple(keys[:2]), tuple(keys[2:]), {kind: 1})
    assert len(list(folder.folder.iterdir())) == 2
    monkeypatch.undo()
    stored(tier, [3, 4])


def test_a_slow_disk_is_reported(folder: BlockFolder) -> None:
    ticks = iter(range(0, 1000, 5))
    made = Tier.__new__(Tier)
    made.pool, made.said = Pool(), Queue()
    made.tier = DiskTier(folder, made.pool, made.said.put, clock=lambda: float(next(ticks)))
    made.tier.start()
    made.hear()
    stored(made, [1])
    made.tell(FetchBlocks(1, (block(1),)))
    assert made.hear() == BlocksFetched(1, 1, (), {"slow": 1})
    made.tier.stop()


def test_stop_finishes_what_was_taken_and_gives_the_folder_up(folder: BlockFolder) -> None:
    tier = Tier(folder)
    tier.pool.blocks |= {number: payload(number) for number in range(1, 40)}
    for number in range(1, 40):
        tier.tell(StoreBlocks((block(number),), (number,)))
    tier.tier.stop()
    assert len(list(folder.folder.iterdir())) == 39
    reopened(folder).close()


def test_the_threads_end_when_the_front_is_gone(folder: BlockFolder) -> None:
    def send(message: Message) -> None:
        raise BrokenPipeError

    tier = DiskTier(folder, Pool(), send)
    tier.start()
    tier.handle(FetchBlocks(1, (block(1),)))
    tier.stop()
    assert tier_threads() == []
