"""What is read from a model's folder, for each way that folders write it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlxd.errors import ConfigError
from mlxd.text.model_files import ModelFiles


def read(folder: Path, override: str | None = None, /, **files: Any) -> ModelFiles:
    """Writes `name=content` as name.json and reads the folder."""
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return ModelFiles.read(folder, override)


def test_an_empty_folder_says_nothing(tmp_path: Path) -> None:
    files = read(tmp_path)
    assert (files.config, files.generation_config, files.tokenizer_config) == ({}, {}, {})
    assert (files.chat_templates, files.special_tokens, files.eos_token_ids) == ({}, {}, ())
    assert (files.max_model_len, files.model_type, files.default_temperature) == (None, "", None)


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"max_position_embeddings": 8192}, 8192),
        ({"n_positions": 1024}, 1024),
        ({"max_seq_len": 2048, "max_position_embeddings": 4096}, 4096),
        ({"text_config": {"max_position_embeddings": 131072}}, 131072),
        ({"max_position_embeddings": 1e30}, None),
        ({"max_position_embeddings": None}, None),
        (
            {
                "max_position_embeddings": 32768,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            131072,
        ),
    ],
)
def test_context_length(tmp_path: Path, config: dict[str, Any], length: int | None) -> None:
    assert read(tmp_path, config=config).max_model_len == length


def test_eos_ids_are_those_of_all_files(tmp_path: Path) -> None:
    files = read(
        tmp_path,
        generation_config={"eos_token_id": [7, 8]},
        config={"eos_token_id": 8, "text_config": {"eos_token_id": [9, None]}},
        tokenizer_config={"eos_token": "<end>", "added_tokens_decoder": {"5": {"content": "<end>"}}},
    )
    assert files.eos_token_ids == (7, 8, 9, 5)


@pytest.mark.parametrize(
    "more",
    [
        {
            "tokenizer": {
                "model": {"vocab": {"x": 0}},
                "added_tokens": [{"id": 3, "content": "<end>", "special": True}],
            }
        },
        {"added_tokens": {"<end>": 3}},
    ],
)
def test_the_eos_token_is_found_among_added_tokens(tmp_path: Path, more: dict[str, Any]) -> None:
    assert read(tmp_path, tokenizer_config={"eos_token": "<end>"}, **more).eos_token_ids == (3,)


def test_an_eos_token_without_an_id_adds_none(tmp_path: Path) -> None:
    assert read(tmp_path, tokenizer_config={"eos_token": "<end>"}, tokenizer={}).eos_token_ids == ()


def test_special_tokens_by_name(tmp_path: Path) -> None:
    config = {
        "bos_token": {"content": "<s>", "lstrip": False},
        "eos_token": "</s>",
        "pad_token": None,
        "image_token": "<image>",
        "add_bos_token": True,
        "extra_special_tokens": {"audio_token": "<audio>"},
    }
    files = read(tmp_path, tokenizer_config=config, special_tokens_map={"eos_token": "<eot>"})
    expected = {"bos_token": "<s>", "eos_token": "<eot>", "image_token": "<image>", "audio_token": "<audio>"}
    assert files.special_tokens == expected
    # Where the configuration lists the tokens themselves, the older file no longer counts.
    files = read(tmp_path, tokenizer_config={**config, "added_tokens_decoder": {}})
    assert files.special_tokens["eos_token"] == "</s>"


def test_sampling_defaults(tmp_path: Path) -> None:
    settings = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1}
    files = read(tmp_path, generation_config=settings)
    assert files.default_temperature == 0.6
    assert (files.default_top_p, files.default_top_k, files.default_min_p) == (0.9, 20, 0.1)
    assert files.default_repetition_penalty == 1.1
    assert read(tmp_path, generation_config={**settings, "do_sample": True}).default_temperature == 0.6
    assert read(tmp_path, generation_config={**settings, "do_sample": False}).default_temperature is None
    assert read(tmp_path, generation_config={"temperature": None}).default_temperature is None


def test_templates_in_the_tokenizer_configuration(tmp_path: Path) -> None:
    assert read(tmp_path, tokenizer_config={"chat_template": "x"}).chat_templates == {"default": "x"}
    named = [{"name": "default", "template": "x"}, {"name": "tool_use", "template": "y"}]
    files = read(tmp_path, tokenizer_config={"chat_template": named})
    assert files.chat_templates == {"default": "x", "tool_use": "y"}


def test_template_files_win_in_order(tmp_path: Path) -> None:
    config = {"tokenizer_config": {"chat_template": "configuration"}}
    files = read(tmp_path, **config, chat_template={"chat_template": "json"})
    assert files.chat_templates == {"default": "json"}
    (tmp_path / "chat_template.jinja").write_text("jinja é", encoding="utf-8")
    assert read(tmp_path, **config).chat_templates == {"default": "jinja é"}
    (tmp_path / "chat_templates").mkdir()
    (tmp_path / "chat_templates" / "tool_use.jinja").write_text("tools")
    assert read(tmp_path, **config).chat_templates == {"default": "jinja é", "tool_use": "tools"}


def test_an_override_is_a_file_or_a_template(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("mine")
    config = {"tokenizer_config": {"chat_template": [{"name": "tool_use", "template": "y"}]}}
    assert read(tmp_path, str(path), **config).chat_templates == {"default": "mine"}
    assert read(tmp_path, "{{ messages }}").chat_templates == {"default": "{{ messages }}"}
    with pytest.raises(ConfigError, match="nowhere"):
        read(tmp_path, str(tmp_path / "nowhere.jinja"))


def test_files_that_are_not_what_they_should_be(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read as JSON"):
        read(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="a JSON object was expected, not list"):
        read(tmp_path)
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        read(tmp_path, config={}, tokenizer_config={"eos_token": "x"}, tokenizer={"added_tokens": 3})
