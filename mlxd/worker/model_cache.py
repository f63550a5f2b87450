"""Where made and fetched model files are kept, and how a folder appears there whole or not at all.

It does not know what is in the folders.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from mlxd.step import Progress

Report = Callable[[Progress], None]
"""Called now and then while something slow moves."""


def cache_root(environ: Mapping[str, str] = os.environ) -> Path:
    """$MLXD_CACHE, else $XDG_CACHE_HOME/mlxd, else ~/.cache/mlxd."""
    if path := environ.get("MLXD_CACHE"):
        return Path(path).expanduser()
    if path := environ.get("XDG_CACHE_HOME"):
        return Path(path).expanduser() / "mlxd"
    return Path.home() / ".cache" / "mlxd"


def build_folder(target: Path, build: Callable[[Path], None]) -> Path:
    """`target`, made by `build(folder)` if it is not there yet.

    `build` fills a temporary folder beside it, which then takes the name in one step: a reader never sees
    half a folder, and of two processes that build at once the first wins.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        build(temporary)
        temporary.chmod(0o755)
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
