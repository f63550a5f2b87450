"""Loading: types by device, dequantised on CPUs, planned sizes equal real ones; sources and their errors."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from huggingface_hub import errors
from mlx.utils import tree_flatten
from mlx_lm.models.mla import MultiLinear
from mlx_lm.models.switch_layers import SwitchLinear

from mlxd.config import ModelConfig
from mlxd.errors import ConfigError, WorkerError
from mlxd.step import Progress
from mlxd.worker.loader import dequantised, open_model
from mlxd.worker.model_facts import context_length
from mlxd.worker.model_source import resolve_model
from tests.worker.model_folders import write_llama


def quiet(progress: Progress) -> None:
    """Nobody watches."""


def dtypes(model: nn.Module) -> set[mx.Dtype]:
    return {array.dtype for _, array in tree_flatten(model.parameters())}


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_on_cpus_everything_becomes_float32_with_the_same_outputs(tmp_path: Path, bits: int | None) -> None:
    original = write_llama(tmp_path, bits=bits, dtype=mx.float16)
    skeleton = open_model(tmp_path, ModelConfig(), "cpu")
    planned = skeleton.weights_bytes()
    reports: list[Progress] = []
    loaded = skeleton.load(reports.append)
    assert loaded.dtype == mx.float32 and dtypes(loaded.model) == {mx.float32}
    assert planned == loaded.weights_bytes
    tokens = mx.array([[3, 1, 4, 1, 5]])
    original.set_dtype(mx.float32)  # scales too: quantised layers then compute in float32
    np.testing.assert_allclose(np.array(loaded.model(tokens)), np.array(original(tokens)), atol=2e-4)
    assert [report.done for report in reports] == sorted(report.done for report in reports)
    assert reports[-1].done == reports[-1].total > 0


def test_on_gpus_the_checkpoint_stays_as_it_is(tmp_path: Path) -> None:
    write_llama(tmp_path, bits=4, dtype=mx.bfloat16)
    skeleton = open_model(tmp_path, ModelConfig(), "metal")
    planned = skeleton.weights_bytes()
    loaded = skeleton.load(quiet)
    assert loaded.dtype == mx.bfloat16
    assert dtypes(loaded.model) == {mx.bfloat16, mx.uint32}
    assert planned == loaded.weights_bytes


def test_a_type_asked_for_is_given(tmp_path: Path) -> None:
    write_llama(tmp_path, bits=4, dtype=mx.bfloat16)
    skeleton = open_model(tmp_path, ModelConfig(dtype="float16"), "cuda")
    planned = skeleton.weights_bytes()
    loaded = skeleton.load(quiet)
    assert loaded.dtype == mx.float16
    assert dtypes(loaded.model) == {mx.float16, mx.uint32}
    assert planned == loaded.weights_bytes


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_every_kind_of_quantised_layer_is_undone(mode: str) -> None:
    mx.random.seed(0)
    x = mx.random.normal((2, 1, 1, 64))
    layers: list[tuple[nn.Module, tuple[Any, ...]]] = [
        (nn.Linear(64, 32, bias=True), (x,)),
        (nn.Linear(64, 32, bias=False), (x,)),
        (nn.Embedding(8, 64), (mx.array([1, 7]),)),
        (SwitchLinear(64, 32, 4, bias=True), (x, mx.array([[0], [3]], dtype=mx.uint32))),
        (MultiLinear(64, 32, 2), (mx.random.normal((1, 2, 3, 64)),)),
    ]
    for layer, arguments in layers:
        quantised = layer.to_quantized(group_size=32, bits=4, mode=mode)
        plain = dequantised(quantised, mx.float32)
        assert type(plain) is type(layer)
        expected = np.array(quantised(*arguments).astype(mx.float32))
        np.testing.assert_allclose(np.array(plain(*arguments)), expected, atol=1e-4, err_msg=repr(layer))
    assert dequantised(nn.Linear(4, 4), mx.float32) is None


def test_arrays_outside_modules_are_cast_too(tmp_path: Path) -> None:
    write_llama(tmp_path, dtype=mx.float16)
    skeleton = open_model(tmp_path, ModelConfig(), "cpu")
    skeleton.model.extra = [mx.ones((2,), dtype=mx.float16)]
    loaded = skeleton.load(quiet)
    assert loaded.model.extra[0].dtype == mx.float32


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "config.json").write_text("{"), "config.json .* cannot be read"),
        (lambda folder: (folder / "config.json").write_text("{}"), "names no model_type"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.*safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\1" * 64), "cannot be loaded"),
        (lambda folder: rewrite(folder, model_type="hal9000"), "architecture 'hal9000'"),
        (lambda folder: rewrite(folder, model_file="evil.py"), "trust_remote_code"),
        (lambda folder: rewrite(folder, num_hidden_layers=3), "cannot be loaded: Missing"),
    ],
)
def test_what_cannot_be_loaded_says_why(tmp_path: Path, damage: Any, reason: str) -> None:
    write_llama(tmp_path / "tiny")
    damage(tmp_path / "tiny")
    with pytest.raises(ConfigError, match=reason) as caught:
        open_model(tmp_path / "tiny", ModelConfig(path="some/model"), "cpu").load(quiet)
    assert str(tmp_path) not in str(caught.value)


def rewrite(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_context_length_whatever_the_family_calls_it() -> None:
    assert context_length({"max_position_embeddings": 4096}) == 4096
    assert context_length({"n_positions": 1024}) == 1024
    assert context_length({"text_config": {"max_position_embeddings": 32}, "vision_config": {}}) == 32
    assert context_length({"model_type": "x"}) is None


def resolve(path: str | None, report: Any = quiet, **options: Any) -> tuple[Path, list[Path]]:
    announced: list[Path] = []
    return resolve_model(ModelConfig(path=path, **options), report, announced.append), announced


def test_a_folder_is_itself(tmp_path: Path) -> None:
    write_llama(tmp_path / "tiny")
    assert resolve(str(tmp_path / "tiny")) == (tmp_path / "tiny", [tmp_path / "tiny"])


def test_no_model_no_folder_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").touch()
    (tmp_path / "m.gguf").touch()
    with pytest.raises(ConfigError, match=r"model\.path is not set"):
        resolve(None)
    with pytest.raises(ConfigError, match="no such file or folder"):
        resolve("/no/such/folder")
    with pytest.raises(ConfigError, match="no such file or folder"):
        resolve("missing.gguf")
    with pytest.raises(ConfigError, match=r"is a file, but no \.gguf file"):
        resolve(str(tmp_path / "weights.bin"))
    with pytest.raises(ConfigError, match=r"no config\.json.*its file m\.gguf\?"):
        resolve(str(tmp_path))


def test_a_hub_model_announces_its_small_files_before_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        calls.append(options | {"repo_id": repo_id, "announced": list(announced)})
        (tmp_path / "config.json").touch()
        bars = [
            options["tqdm_class"](total=total, unit=unit, name="n") for total, unit in ((200, "B"), (3, "it"))
        ]
        for bar in bars:
            bar.update(2)
            bar.refresh()
            bar.close()
        return str(tmp_path)

    announced: list[Path] = []
    reports: list[Progress] = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    options = ModelConfig(path="org/model", revision="v2")
    assert resolve_model(options, reports.append, announced.append) == tmp_path
    assert [(call["repo_id"], call["revision"], call["announced"]) for call in calls] == [
        ("org/model", "v2", []),
        ("org/model", "v2", [tmp_path]),
    ]
    assert not any("safetensors" in pattern for pattern in calls[0]["allow_patterns"])
    assert "model*.safetensors" in calls[1]["allow_patterns"]
    downloads = {(report.done, report.total) for report in reports if report.stage == "download"}
    assert (2, 200) in downloads and not any(total == 3 for _, total in downloads)
    assert stderr.getvalue() == ""


@pytest.mark.parametrize(
    ("raised", "offline", "expected", "reason"),
    [
        (errors.RepositoryNotFoundError, False, ConfigError, "neither a folder.*nor such a model"),
        (errors.GatedRepoError, False, ConfigError, "accept its licence"),
        (errors.RevisionNotFoundError, False, ConfigError, "no revision 'v9'"),
        (errors.LocalEntryNotFoundError, False, WorkerError, "cannot be reached"),
        (errors.LocalEntryNotFoundError, True, WorkerError, "not downloaded yet"),
        (ConnectionError, False, WorkerError, r"downloading org/m at v9 failed \(ConnectionError\)"),
    ],
)
def test_hub_errors_in_words(
    monkeypatch: pytest.MonkeyPatch,
    raised: type[Exception],
    offline: bool,
    expected: type[Exception],
    reason: str,
) -> None:
    def snapshot_download(repo_id: str, **options: Any) -> str:
        error = raised.__new__(raised)
        error.args = ("https://internal/path?token=secret",)
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(expected, match=reason):
        resolve_model(ModelConfig(path="org/m", revision="v9"), quiet, lambda _: None, offline=offline)


def test_hub_offline_mode_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(repo_id: str, **options: Any) -> str:
        raise errors.LocalEntryNotFoundError("x")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE"):
        resolve("org/m")
