"""Opens the disk tier that the configuration asks for, or says why there is none.

It does not know MLX: whoever has the pool gives its bytes a fingerprint.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

import msgspec

from mlxd.config import CacheConfig
from mlxd.step import Message
from mlxd.worker.disk.block_file import FINGERPRINT_BYTES, BlockFormat
from mlxd.worker.disk.folder import BlockFolder, DiskTierError
from mlxd.worker.disk.tier import BlockMover, DiskTier

GB = 10**9


def fingerprint(facts: dict[str, object]) -> bytes:
    """Of everything that decides what a block's bytes mean; JSON-like values."""
    return blake2b(msgspec.json.encode(facts, order="deterministic"), digest_size=FINGERPRINT_BYTES).digest()


def open_disk_tier(
    config: CacheConfig,
    facts: dict[str, object],
    *,
    block_bytes: int,
    mover: BlockMover,
    send: Callable[[Message], None],
) -> tuple[DiskTier | None, tuple[str, ...]]:
    """The tier, not yet started, and warnings. `block_bytes` are a block's in the pool."""
    if config.disk_path is None or not config.prefix_caching:
        return None, ()
    block_format = BlockFormat(fingerprint(facts), config.block_size, block_bytes)
    folder = BlockFolder(Path(config.disk_path).expanduser(), block_format, int(config.disk_max_gb * GB))
    try:
        folder.open()
    except DiskTierError as error:
        return None, (f"the prefix cache has no disk tier: {error}",)
    return DiskTier(folder, mover, send), ()
