"""What a model's folder says about the texts of embeddings: sentence-transformers' prompts.

It does not know tokens, pooling or requests; it reads two small JSON files, which need not be there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlxd.text.model_files import read_json

INPUT_TYPES = {
    "query": ("query", "search_query", "s2p_query", "retrieval.query"),
    "document": ("document", "passage", "search_document", "corpus", "retrieval.passage"),
}
"""What requests ask for -> under which names models have a prompt for it."""


@dataclass(frozen=True, slots=True)
class SentenceFiles:
    """`prompts` by name; `default_prompt` is put before texts of requests that ask for none ("": nothing)."""

    prompts: Mapping[str, str]
    default_prompt: str
    do_lower_case: bool

    @classmethod
    def read(cls, folder: Path) -> SentenceFiles:
        """Raises ConfigError where a file is not JSON of the expected shape."""
        config = read_json(folder / "config_sentence_transformers.json")
        prompts = config.get("prompts")
        named = prompts if isinstance(prompts, dict) else {}
        texts = {str(name): text for name, text in named.items() if isinstance(text, str)}
        return cls(
            prompts=texts,
            default_prompt=texts.get(str(config.get("default_prompt_name")), ""),
            do_lower_case=read_json(folder / "sentence_bert_config.json").get("do_lower_case") is True,
        )

    def prompt_of_type(self, input_type: str) -> str | None:
        """The prompt for texts of a type ("": the model needs none); None for a type that nobody knows."""
        for names in INPUT_TYPES.values():
            if input_type in names:
                return next((self.prompts[name] for name in names if name in self.prompts), "")
        return self.prompts.get(input_type)
