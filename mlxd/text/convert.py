"""Converts a tokeniser without tokenizer.json: `python -m mlxd.text.convert FOLDER` prints a tokenizer.json.

It does not know mlxd's Tokenizer. It is a process of its own, because it imports transformers.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def convert(folder: Path, trust_remote_code: bool) -> str:
    """tokenizer.json's text. Raises ValueError where transformers has no fast form of the tokeniser."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        folder, trust_remote_code=trust_remote_code, local_files_only=True, use_fast=True
    )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{type(tokenizer).__name__} has no fast form")
    text: str = backend.to_str()
    return text


def main(arguments: list[str]) -> int:
    """Exit code 0, or 1 with the reason as the last line of stderr."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Libraries print warnings to stdout too; only the result may arrive there.
    result = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        text = convert(Path(arguments[0]), "--trust-remote-code" in arguments[1:])
    except Exception as error:  # whatever it is, the parent process reports it
        message = " ".join(str(error).split())
        print(f"{type(error).__name__}: {message}", file=sys.stderr)
        return 1
    with result:
        result.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
