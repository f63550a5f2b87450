"""What every benchmark result carries: date, machine, versions, commit, flags and seed; and where it goes.

It does not know what was measured. Results are JSON, one object a file.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

import orjson

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("mlxd", "mlx", "mlx-lm", "uvloop", "httptools", "tokenizers", "numpy")


def provenance(name: str, *, flags: dict[str, object], seed: int | None) -> dict[str, object]:
    """The head of a result: what ran, when, where, with what. `flags` must be JSON."""
    return {
        "benchmark": name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "flags": flags,
        "seed": seed,
    }


def machine() -> dict[str, object]:
    """Host facts; `load_average` because a shared machine's figures mean little without it."""
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    """Installed versions of what the figures depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit(root: Path = ROOT, environ: Mapping[str, str] = os.environ) -> str:
    """The checkout's commit, with `+dirty` where tracked files differ.

    A copy without git, as on a borrowed machine, is told it: in MLXD_COMMIT, which comes first, or in a file
    COMMIT at its root (`git describe --always --abbrev=12 --dirty=+dirty > COMMIT`); else it is `unknown`.
    """
    if environ.get("MLXD_COMMIT"):
        return environ["MLXD_COMMIT"]
    try:
        command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+dirty"]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        file = root / "COMMIT"
        return file.read_text().strip() if file.is_file() else "unknown"


def write(path: Path, result: dict[str, object]) -> None:
    """Write `result` as indented JSON, making the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY) + b"\n")


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
