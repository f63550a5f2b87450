"""What a model's folder says about text: configuration, generation defaults, special tokens, chat templates.

It does not know weights, tokenisers or where the folder came from; it reads small JSON and Jinja files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from mlxd.errors import ConfigError

DEFAULT_TEMPLATE = "default"

_CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "n_ctx",
)
"""The names that model families use for the context length, the usual one first."""

_UNBOUNDED = 10**9
"""Larger lengths are a way of writing "no limit" (transformers writes 1e30 in some configurations)."""


class _AddedToken(msgspec.Struct):
    id: int
    content: str


class _TokenizerJson(msgspec.Struct):
    """The one part of tokenizer.json that is read here; msgspec skips the vocabulary without building it."""

    added_tokens: list[_AddedToken] = []


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The text side of a model's folder.

    `config`, `generation_config` and `tokenizer_config` are the files' contents ({} where there is none).
    `special_tokens` maps names (`bos_token`, `eos_token`, `image_token`, …) to their text: chat
    templates see them as variables. `chat_templates` maps names to Jinja source; the usual one is `default`.
    `max_model_len` is in tokens, None where the configuration does not say. The `default_*` are the model's
    own sampling defaults, None where it has no opinion; `default_temperature` is also None where
    generation_config says do_sample false, because a temperature written beside that was never in use.
    """

    path: Path
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    tokenizer_config: Mapping[str, Any]
    special_tokens: Mapping[str, str]
    chat_templates: Mapping[str, str]
    eos_token_ids: tuple[int, ...]
    max_model_len: int | None
    model_type: str
    default_temperature: float | None
    default_top_p: float | None
    default_top_k: int | None
    default_min_p: float | None
    default_repetition_penalty: float | None

    @classmethod
    def read(cls, folder: Path, chat_template_override: str | None = None) -> ModelFiles:
        """Reads the folder.

        `chat_template_override` replaces all of the model's templates: a file's path, or template text.
        Raises ConfigError where a file is not JSON of the expected shape or the override cannot be read.
        """
        config = read_json(folder / "config.json")
        generation_config = read_json(folder / "generation_config.json")
        tokenizer_config = read_json(folder / "tokenizer_config.json")
        special_tokens = _special_tokens(folder, tokenizer_config)
        if chat_template_override is None:
            templates = _chat_templates(folder, tokenizer_config)
        else:
            templates = {DEFAULT_TEMPLATE: _override_template(chat_template_override)}
        eos_token_id = _added_token_id(folder, tokenizer_config, special_tokens.get("eos_token"))
        samples = generation_config.get("do_sample") is not False
        top_k = _number(generation_config, "top_k")
        return cls(
            path=folder,
            config=config,
            generation_config=generation_config,
            tokenizer_config=tokenizer_config,
            special_tokens=special_tokens,
            chat_templates=templates,
            eos_token_ids=_eos_token_ids(generation_config, config, _text_config(config), eos_token_id),
            max_model_len=_max_model_len(config),
            model_type=str(config.get("model_type") or _text_config(config).get("model_type") or ""),
            default_temperature=_number(generation_config, "temperature") if samples else None,
            default_top_p=_number(generation_config, "top_p"),
            default_top_k=None if top_k is None else int(top_k),
            default_min_p=_number(generation_config, "min_p"),
            default_repetition_penalty=_number(generation_config, "repetition_penalty"),
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is no such file. ConfigError for anything else."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: a JSON object was expected, not {type(value).__name__}")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error


def _number(config: Mapping[str, Any], key: str) -> float | None:
    value = config.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a multimodal configuration; empty for others."""
    text_config = config.get("text_config")
    return text_config if isinstance(text_config, dict) else {}


def _token_text(value: object) -> str | None:
    """A token is written as its text or as {"content": text, …}."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _special_tokens(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    sources: list[Mapping[str, Any]] = [tokenizer_config]
    if "added_tokens_decoder" not in tokenizer_config:
        # Older folders keep the names in a file of their own, which wins (as in transformers).
        sources.append(read_json(folder / "special_tokens_map.json"))
    tokens: dict[str, str] = {}
    for source in sources:
        extra = source.get("extra_special_tokens")
        named = {**source, **extra} if isinstance(extra, dict) else source
        for name, value in named.items():
            text = _token_text(value) if name.endswith("_token") else None
            if text is not None:
                tokens[name] = text
    return tokens


def _added_token_id(folder: Path, tokenizer_config: Mapping[str, Any], text: str | None) -> int | None:
    """The id of an added token, found without loading the tokeniser."""
    if text is None:
        return None
    decoder = tokenizer_config.get("added_tokens_decoder")
    for token_id, token in decoder.items() if isinstance(decoder, dict) else ():
        if _token_text(token) == text:
            return int(token_id)
    try:
        data = (folder / "tokenizer.json").read_bytes()
    except FileNotFoundError:
        value = read_json(folder / "added_tokens.json").get(text)
        return value if isinstance(value, int) else None
    try:
        added_tokens = msgspec.json.decode(data, type=_TokenizerJson).added_tokens
    except msgspec.DecodeError as error:
        raise ConfigError(f"{folder / 'tokenizer.json'}: {error}") from error
    return next((token.id for token in added_tokens if token.content == text), None)


def _eos_token_ids(
    generation_config: Mapping[str, Any],
    config: Mapping[str, Any],
    text_config: Mapping[str, Any],
    tokenizer_eos: int | None,
) -> tuple[int, ...]:
    """All ids that end a turn, in the order found, none twice."""

    def candidates() -> Iterator[object]:
        for source in (generation_config, config, text_config):
            value = source.get("eos_token_id")
            yield from value if isinstance(value, list) else [value]
        yield tokenizer_eos

    ids = (value for value in candidates() if isinstance(value, int) and not isinstance(value, bool))
    return tuple(dict.fromkeys(ids))


def _max_model_len(config: Mapping[str, Any]) -> int | None:
    for source in (config, _text_config(config)):
        for key in _CONTEXT_KEYS:
            length = _number(source, key)
            if length is not None and 0 < length < _UNBOUNDED:
                return max(int(length), _yarn_length(source))
    return None


def _yarn_length(config: Mapping[str, Any]) -> int:
    """The length that a YaRN section asks for, else 0.

    Qwen's cards say to add the section and leave max_position_embeddings at the original length; DeepSeek and
    gpt-oss raise both. Other kinds of scaling come with max_position_embeddings already raised.
    """
    scaling = config.get("rope_scaling") or config.get("rope_parameters")
    if not isinstance(scaling, dict) or scaling.get("rope_type", scaling.get("type")) != "yarn":
        return 0
    original = _number(scaling, "original_max_position_embeddings") or 0
    return int(original * (_number(scaling, "factor") or 0))


def _chat_templates(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Files of their own win over tokenizer_config.json, chat_template.jinja over chat_template.json."""
    found: dict[str, str] = {}
    if (folder / "chat_template.jinja").is_file():
        found[DEFAULT_TEMPLATE] = _read_text(folder / "chat_template.jinja")
    for path in sorted((folder / "chat_templates").glob("*.jinja")):
        found[path.stem] = _read_text(path)
    if not found:
        found = _named_templates(read_json(folder / "chat_template.json").get("chat_template"))
    return found or _named_templates(tokenizer_config.get("chat_template"))


def _named_templates(value: object) -> dict[str, str]:
    """A template is written as its text, a list of {"name", "template"}, or a map from names."""
    if isinstance(value, str):
        return {DEFAULT_TEMPLATE: value}
    if isinstance(value, list):
        value = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
    if isinstance(value, dict):
        return {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, str)}
    return {}


def _override_template(override: str) -> str:
    if "{{" in override or "{%" in override:
        return override
    return _read_text(Path(override).expanduser())
