"""The built-in tokenizer of playback: 256 bytes and three special tokens, ChatML for messages.

It does not know the worker: it writes a folder such as any model has.
"""

from __future__ import annotations

import json
from pathlib import Path

from mlxd.worker.model_cache import build_folder, cache_root

VERSION = 1
"""part of the folder's name: raise it when the files change"""
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TURN = 258
MAX_MODEL_LEN = 131072
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def playback_folder() -> Path:
    """The folder, in the cache; written on first use."""
    return build_folder(cache_root() / f"playback-{VERSION}", write_files)


def write_files(folder: Path) -> None:
    vocab_size = 256 + len(SPECIAL_TOKENS)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    ids = dict(zip(SPECIAL_TOKENS, range(256, vocab_size), strict=True))
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": token_id, "content": token, **added} for token, token_id in ids.items()],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": byte_alphabet() | ids, "merges": []},
    }
    config = {
        "model_type": "playback",
        "vocab_size": vocab_size,
        "max_position_embeddings": MAX_MODEL_LEN,
        "eos_token_id": END_OF_TURN,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL_TOKENS[END_OF_TURN - 256],
        "model_max_length": MAX_MODEL_LEN,
        "clean_up_tokenization_spaces": False,
    }
    files = {
        "tokenizer.json": tokenizer,
        "config.json": config,
        "tokenizer_config.json": tokenizer_config,
        "generation_config.json": {"eos_token_id": END_OF_TURN},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def byte_alphabet() -> dict[str, int]:
    """The character by which byte-level BPE writes each byte: itself if printable, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
