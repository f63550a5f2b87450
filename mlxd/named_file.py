"""Reads the files that a configuration names: whole, but none that is larger than it can need to be.

It does not know what is in them.
"""

from __future__ import annotations

from pathlib import Path

from mlxd.errors import ConfigError


def read_named_file(path: Path, max_bytes: int, key: str | None = None) -> bytes:
    """Its content. Raises ConfigError, with the `key` that names the file if there is one, where it cannot be
    read or has more than `max_bytes`."""
    place = f"{path}" if key is None else f"{key}: {path}"
    try:
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
    except OSError as error:
        raise ConfigError(f"{place}: cannot be read: {error.strerror or error}") from None
    if len(raw) > max_bytes:
        raise ConfigError(f"{place}: larger than {max_bytes} bytes")
    return raw
