"""The directory of stored blocks: names, space, what is there at start, and what must go.

It does not know threads, messages or MLX. Below `cache.disk_path` lies `mlxd-kv` (0700) with `lock`, `salt`
and a folder for each fingerprint; in it, `KEY.kv` for each block. Nothing else is ever touched.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mlxd.step import StoredBlock
from mlxd.worker.disk.block_file import KEY_BYTES, BlockFileError, BlockFormat, Bytes, Fault

FOLDER = "mlxd-kv"
SUFFIX, PART_SUFFIX = ".kv", ".part"
SEED_BYTES = 16
MAX_BLOCKS = 1 << 18
"""Files; however small blocks are, the front remembers each of them."""
SECTOR_BYTES = 4096
"""Files take whole ones of these."""
LOCK_SECONDS = 3.0
"""How long to wait for a predecessor that is just dying."""


class DiskTierError(Exception):
    """The folder cannot be used. The message is for users: it names no path."""


@dataclass(frozen=True, slots=True)
class OtherFile:
    """A block of another fingerprint: useless to this worker, but it takes space."""

    path: str
    num_bytes: int


class BlockFolder:
    """The blocks of one model, and the space that all of them take below `root`.

    All methods but `read` belong to one thread. `max_bytes` bounds this model's files and those of others
    together; others' go first.
    """

    def __init__(self, root: Path, block_format: BlockFormat, max_bytes: int) -> None:
        self.root = root
        self.format = block_format
        self.max_bytes = max_bytes
        self.seed = b""
        """known once it is open"""
        self._lock = -1
        self._keys: set[bytes] = set()
        self._found: dict[bytes, float] = {}
        """key -> when it was last used, of what was there at `open` and has not been looked at"""
        self._others: list[OtherFile] = []
        """newest first"""
        self._other_bytes = 0

    @property
    def block_bytes(self) -> int:
        """What a block takes on disk."""
        return -(-self.format.file_bytes // SECTOR_BYTES) * SECTOR_BYTES

    @property
    def max_blocks(self) -> int:
        return min(MAX_BLOCKS, self.max_bytes // self.block_bytes)

    @property
    def folder(self) -> Path:
        return self.root / FOLDER / self.format.fingerprint.hex()

    def path(self, key: bytes) -> Path:
        return self.folder / (key.hex() + SUFFIX)

    def open(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Make and lock the folder and list it. DiskTierError if that cannot be, or no block has room."""
        if self.max_blocks < 1:
            raise DiskTierError(
                f"cache.disk_max_gb allows {self.max_bytes} bytes, and a block takes {self.block_bytes}"
            )
        base = self.root / FOLDER
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            for folder in (base, self.folder):
                folder.mkdir(mode=0o700, exist_ok=True)
            self._lock = os.open(base / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            self._take_lock(clock)
            self.seed = read_seed(base / "salt")
            self._list(base)
        except OSError as error:
            self.close()
            raise DiskTierError(f"cache.disk_path cannot be used: {error.strerror}") from error

    def close(self) -> None:
        """Let others have the folder."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def scan(self, faults: list[Fault]) -> Iterator[StoredBlock]:
        """What was there at `open`, last used first. What is no good is removed, and its fault appended."""
        for key in sorted(self._found, key=self._found.__getitem__, reverse=True):
            try:
                block = self.format.read_header(self.path(key))
                if block.key != key:
                    raise BlockFileError(Fault.MISPLACED)
            except BlockFileError as error:
                faults.append(error.fault)
                self.remove(key)
            else:
                yield block
        self._found.clear()

    def read(self, block: StoredBlock, payload: Bytes) -> None:
        """Fill `payload`; the file counts as used now. BlockFileError if it cannot be trusted."""
        path = self.path(block.key)
        self.format.read(path, block, payload)
        with contextlib.suppress(OSError):
            os.utime(path)

    def write(self, block: StoredBlock, payload: Bytes) -> None:
        """Store a block, whole or not at all. OSError as it comes."""
        self._make_room()
        path = self.path(block.key)
        part = path.with_suffix(PART_SUFFIX)
        part.unlink(missing_ok=True)
        try:
            # No fsync: what a crash of the system leaves of a file, its checksums tell.
            self.format.write(part, block, payload)
            part.rename(path)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise
        self._keys.add(block.key)

    def remove(self, key: bytes) -> None:
        """Delete a block's file, if it can be."""
        self._keys.discard(key)
        with contextlib.suppress(OSError):
            self.path(key).unlink(missing_ok=True)

    def _take_lock(self, clock: Callable[[], float]) -> None:
        deadline = clock() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if clock() > deadline:
                    self.close()
                    raise DiskTierError("cache.disk_path is in use by another server") from None
                time.sleep(0.05)

    def _list(self, base: Path) -> None:
        """Learn what is there. Halves of files are left by workers that were killed: they go."""
        others: list[tuple[float, OtherFile]] = []
        for folder in os.scandir(base):
            if not folder.is_dir(follow_symlinks=False):
                continue
            own = folder.name == self.folder.name
            for file in os.scandir(folder.path):
                stem, suffix = os.path.splitext(file.name)
                if suffix not in (SUFFIX, PART_SUFFIX) or not is_key(stem):
                    continue
                if suffix == PART_SUFFIX:
                    os.unlink(file.path)
                    continue
                found = file.stat(follow_symlinks=False)
                if own:
                    self._found[bytes.fromhex(stem)] = found.st_mtime
                else:
                    others.append((found.st_mtime, OtherFile(file.path, found.st_blocks * 512)))
        self._keys.update(self._found)
        others.sort(key=lambda other: -other[0])
        self._others = [other for _, other in others]
        self._other_bytes = sum(other.num_bytes for other in self._others)

    def _make_room(self) -> None:
        """For one more block, at the expense of other models' blocks; the front bounds this model's own."""
        allowed = self.max_bytes - (len(self._keys) + 1) * self.block_bytes
        while self._others and self._other_bytes > allowed:
            other = self._others.pop()
            self._other_bytes -= other.num_bytes
            with contextlib.suppress(OSError):
                os.unlink(other.path)


def is_key(stem: str) -> bool:
    """Whether a file of this name can be a block."""
    try:
        return len(bytes.fromhex(stem)) == KEY_BYTES and stem == stem.lower()
    except ValueError:
        return False


def read_seed(path: Path) -> bytes:
    """The folder's secret; made when it is not there or damaged, which makes all blocks unfindable."""
    with contextlib.suppress(FileNotFoundError):
        seed = path.read_bytes()
        if len(seed) == SEED_BYTES:
            return seed
    part = path.with_suffix(PART_SUFFIX)
    part.unlink(missing_ok=True)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as file:
        seed = secrets.token_bytes(SEED_BYTES)
        file.write(seed)
    part.rename(path)
    return seed
