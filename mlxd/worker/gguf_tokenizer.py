"""Builds Hugging Face tokenizer files (as JSON values) from a GGUF file's metadata.

It does not know weights or files. Two vocabularies occur: byte-level BPE ("gpt2": tokens and merges, plus the
name of a pre-tokenizer) and SentencePiece BPE ("llama": tokens and scores, from which merges follow).
"""

from __future__ import annotations

from typing import Protocol

from mlxd.errors import ConfigError

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
"""values of tokenizer.ggml.token_type that mean something here"""

WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPLIT_PATTERNS = {
    "llama-bpe": rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,3}}|{REST}",
    "qwen2": rf"{CONTRACTIONS}|{WORDS}|\p{{N}}|{REST}",
}
PLAIN = frozenset({"gpt-2", "default"})
SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r"})

Json = dict[str, object]


class TokenizerMetadata(Protocol):
    """The part of gguf.Metadata that is read here."""

    def get(self, key: str) -> object: ...
    def integer(self, key: str, default: int | None = None) -> int: ...
    def text(self, key: str) -> str | None: ...
    def strings(self, key: str) -> list[str]: ...
    def numbers(self, key: str) -> list[float]: ...


def tokenizer_files(metadata: TokenizerMetadata) -> dict[str, Json | str]:
    """File name -> content: tokenizer.json, tokenizer_config.json and, if there is one, the chat template."""
    kind = metadata.text("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ConfigError(f"GGUF files with a {kind!r} tokenizer are not supported")
    tokens = metadata.strings("tokenizer.ggml.tokens")
    types = [int(t) for t in metadata.numbers("tokenizer.ggml.token_type")] or [1] * len(tokens)
    tokenizer = byte_level_bpe(metadata, tokens) if kind == "gpt2" else sentencepiece_bpe(metadata, tokens)
    tokenizer["version"] = "1.0"
    tokenizer["added_tokens"] = [
        {
            "id": token_id,
            "content": tokens[token_id],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": token_type != USER_DEFINED,
        }
        for token_id, token_type in enumerate(types)
        if token_type in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    files: dict[str, Json | str] = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": tokenizer_config(metadata, tokens),
    }
    if template := metadata.text("tokenizer.chat_template"):
        files["chat_template.jinja"] = template
    return files


def tokenizer_config(metadata: TokenizerMetadata, tokens: list[str]) -> Json:
    config: Json = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.integer("{arch}.context_length"),
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        token_id = metadata.integer(f"tokenizer.ggml.{key}_token_id", -1)
        if 0 <= token_id < len(tokens):
            config[f"{name}_token"] = tokens[token_id]
    return config


def adds_bos(metadata: TokenizerMetadata, default: bool) -> bool:
    return bool(metadata.integer("tokenizer.ggml.add_bos_token", int(default)))


def bos_post_processor(metadata: TokenizerMetadata, tokens: list[str]) -> Json:
    """Puts the beginning-of-sequence token before a text."""
    bos_id = metadata.integer("tokenizer.ggml.bos_token_id")
    bos = tokens[bos_id]
    special = {"SpecialToken": {"id": bos, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [special, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [special, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }


def byte_level_bpe(metadata: TokenizerMetadata, tokens: list[str]) -> Json:
    """GPT-2's tokenizer with the pre-tokenizer that tokenizer.ggml.pre names."""
    pre = metadata.text("tokenizer.ggml.pre") or "default"
    byte_level: Json = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    if pre in PLAIN:
        pre_tokenizer = byte_level
    elif pre in SINGLE_DIGITS:
        digits = {"type": "Digits", "individual_digits": True}
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
    elif pre in SPLIT_PATTERNS:
        pattern = {"Regex": SPLIT_PATTERNS[pre]}
        split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [split, {**byte_level, "use_regex": False}]}
    else:
        known = sorted(PLAIN | SINGLE_DIGITS | SPLIT_PATTERNS.keys())
        raise ConfigError(f"GGUF pre-tokenizer {pre!r} is not supported (known: {', '.join(known)})")
    return {
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": bos_post_processor(metadata, tokens)
        if adds_bos(metadata, default=pre == "llama-bpe")
        else byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {token: token_id for token_id, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in metadata.strings("tokenizer.ggml.merges")],
            "ignore_merges": pre == "llama-bpe",
        },
    }


def sentencepiece_bpe(metadata: TokenizerMetadata, tokens: list[str]) -> Json:
    """Llama's first tokenizer: "▁" for a space, bytes as <0x..>, merges in the order of their scores."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prefix = bool(metadata.integer("tokenizer.ggml.add_space_prefix", 1))
    steps: list[Json] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace] if prefix else [replace],
        },
        "pre_tokenizer": None,
        "post_processor": bos_post_processor(metadata, tokens) if adds_bos(metadata, default=True) else None,
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": {
            "type": "BPE",
            "vocab": {token: token_id for token_id, token in enumerate(tokens)},
            "merges": score_merges(tokens, metadata.numbers("tokenizer.ggml.scores")),
            "unk_token": tokens[metadata.integer("tokenizer.ggml.unknown_token_id", 0)],
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }


def score_merges(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """Pairs in the order SentencePiece would join them: the piece with the best score first.

    A piece that several pairs give is listed under each; at equal scores the pair of earlier tokens wins.
    """
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    ranked = [
        (-score, ids[piece[:cut]], ids[piece[cut:]])
        for piece, score in zip(tokens, scores, strict=True)
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    return [(tokens[left], tokens[right]) for _, left, right in sorted(ranked)]
