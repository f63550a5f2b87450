"""`mlxd bench NAME …`: runs `python -m bench.NAME` of a source checkout.

It does not know what the benchmarks are; the bench folder of the current directory does.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mlxd.errors import ConfigError


def run_bench(arguments: Sequence[str]) -> int:
    """Runs a benchmark and returns its exit code. Raises ConfigError where there is none of that name."""
    folder = Path.cwd() / "bench"
    if not folder.is_dir():
        raise ConfigError("bench: the benchmarks are part of the source checkout: run this in its root")
    names = sorted(
        path.stem for path in folder.iterdir() if _is_runnable(path) and not path.name.startswith(("_", "."))
    )
    if not arguments or arguments[0] not in names:
        given = f"{arguments[0]}: no such benchmark" if arguments else "which benchmark?"
        raise ConfigError(f"bench: {given} (there are {', '.join(names)})")
    return subprocess.call([sys.executable, "-m", f"bench.{arguments[0]}", *arguments[1:]])


def _is_runnable(path: Path) -> bool:
    if path.is_dir():
        return (path / "__main__.py").exists()
    return path.suffix == ".py" and "__main__" in path.read_text(encoding="utf-8")
