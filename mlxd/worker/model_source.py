"""From `model.path` to a folder on disk: a local folder, a GGUF file, a Hugging Face id, or the demo model.

It does not read weights. The front gets the folder's path as soon as the small files are there.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlxd.config import ModelConfig
from mlxd.errors import ConfigError, WorkerError
from mlxd.step import Progress
from mlxd.worker.demo_model import DEMO_MODEL, fetch_demo_model
from mlxd.worker.model_cache import Report

SMALL_FILES = (
    "*.json",
    "*.jsonl",
    "*.jinja",
    "*.txt",
    "*.py",
    "*.tiktoken",
    "tokenizer.model",
    "tiktoken.model",
)
WEIGHT_FILES = ("model*.safetensors",)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")


def resolve_model(
    model: ModelConfig, report: Report, on_small_files: Callable[[Path], None], *, offline: bool = False
) -> Path:
    """The folder with config.json and the weights; `on_small_files(folder)` is called before the big ones come.

    `offline`: only what is on disk already (mlxd check). ConfigError where the operator must act, WorkerError
    where another try may help.
    """
    if not model.path:
        raise ConfigError("model.path is not set: give a Hugging Face id, a folder, or a .gguf file")
    report(Progress("resolve", 0, 0, detail=model.path))
    if model.path == DEMO_MODEL:
        folder = converted(fetch_demo_model(report), report)
    else:
        path = Path(model.path).expanduser()
        if path.is_dir():
            folder = checked_folder(path, model.path)
        elif path.is_file():
            if path.suffix != ".gguf":
                raise ConfigError(f"model.path {model.path!r} is a file, but no .gguf file")
            folder = converted(path, report)
        elif HUB_ID.fullmatch(model.path) and path.suffix != ".gguf":
            return hub_folder(model, report, on_small_files, offline=offline)
        else:
            raise ConfigError(f"model.path {model.path!r}: there is no such file or folder")
    on_small_files(folder)
    return folder


def converted(path: Path, report: Report) -> Path:
    # Imported late: it imports MLX, which playback must not.
    from mlxd.worker.gguf import converted_folder

    return converted_folder(path, report)


def checked_folder(path: Path, name: str) -> Path:
    if (path / "config.json").is_file():
        return path
    gguf_files = sorted(file.name for file in path.glob("*.gguf"))
    hint = f"; did you mean its file {gguf_files[0]}?" if gguf_files else ""
    raise ConfigError(f"model.path {name!r} has no config.json, so it is no model folder{hint}")


def hub_folder(
    model: ModelConfig, report: Report, on_small_files: Callable[[Path], None], *, offline: bool
) -> Path:
    """The snapshot of a hub repository, downloaded as far as it is not in Hugging Face's own cache."""
    import huggingface_hub
    from huggingface_hub import errors

    assert model.path is not None
    name = model.path if model.revision is None else f"{model.path} at {model.revision}"

    def fetch(patterns: tuple[str, ...]) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                model.path,
                revision=model.revision,
                allow_patterns=list(patterns),
                tqdm_class=progress_class(report, model.path or ""),
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
        if offline or huggingface_hub.constants.HF_HUB_OFFLINE:
            raise ConfigError(
                f"{name} is not on this machine, and the Hugging Face hub may not be asked"
            ) from None
        raise WorkerError(
            f"{name} is not on this machine, and the Hugging Face hub cannot be reached"
        ) from None
    except OSError as error:
        raise WorkerError(f"downloading {name} failed ({type(error).__name__})") from error


def progress_class(report: Report, detail: str) -> type[Any]:
    """A tqdm class for huggingface_hub that draws nothing and reports bytes.

    The hub shows a download in two bars (received, written) with the same total: the larger one counts.
    """
    from tqdm import tqdm

    furthest = 0

    class ReportingBar(tqdm):  # type: ignore[type-arg, unused-ignore]
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
