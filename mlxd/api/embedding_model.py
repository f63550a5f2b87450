"""The embedding model as the API sees it: its names, prompts and limits, and texts as its inputs.

It does not know requests' schemas or vectors.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mlxd.config import EmbeddingsConfig, model_id
from mlxd.engine.embedding_input import EmbeddingInput
from mlxd.errors import ContextLengthExceeded, InvalidRequestError, ModelNotFoundError, NotReadyError
from mlxd.text.sentence_files import INPUT_TYPES
from mlxd.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mlxd.engine.embedding_engine import EmbeddingEngine
    from mlxd.step import EmbedderReady

DEFAULT_NAME = "default"
TEXTS_AT_ONCE = 64
"""Tokenised in one go: Python's lists of token ids are made under the GIL."""


class EmbeddingModel:
    """One for a server that has one. `names[0]` is what responses carry."""

    __slots__ = ("_num_trailing", "_truncate", "created", "engine", "names", "owned_by", "path", "root")

    def __init__(
        self, config: EmbeddingsConfig, engine: EmbeddingEngine, *, created: int, owned_by: str
    ) -> None:
        self.engine = engine
        self.created = created
        self.owned_by = owned_by
        self.path = config.model
        self.root = model_id(config.model) if config.model else DEFAULT_NAME
        self.names: tuple[str, ...] = config.names or (DEFAULT_NAME,)
        self._truncate = config.truncate
        self._num_trailing: int | None = None

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def max_model_len(self) -> int | None:
        """Tokens of an input; None until the model is loaded."""
        info = self.engine.info
        return None if info is None else info.max_model_len

    @property
    def info(self) -> EmbedderReady:
        """Raises NotReadyError until it is loaded."""
        self.engine.check_ready()
        assert self.engine.info is not None
        return self.engine.info

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises NotReadyError until it is loaded."""
        if self.engine.tokenizer is None:
            raise NotReadyError("the embedding model is loading")
        return self.engine.tokenizer

    def check_name(self, asked: str | None) -> None:
        """A request may name any of the names, `default`, or nothing.

        Raises:
            ModelNotFoundError
        """
        if asked is not None and asked not in (*self.names, self.root, self.path, DEFAULT_NAME):
            raise ModelNotFoundError(
                f"{asked[:200]!r} is no embedding model; this server has {', '.join(self.names)}",
                param="model",
            )

    def prompt(self, prompt_name: str | None, input_type: str | None) -> str:
        """The text that the model wants before inputs of a kind; "" where it wants none.

        Raises:
            InvalidRequestError: the model has no such prompt.
        """
        files = self.engine.sentence_files
        if files is None:
            raise NotReadyError("the embedding model is loading")
        if prompt_name is not None:
            if prompt_name not in files.prompts:
                known = ", ".join(files.prompts) or "none"
                raise InvalidRequestError(
                    f"prompt_name: the model has no prompt {prompt_name[:100]!r} (it has {known})",
                    param="prompt_name",
                )
            return files.prompts[prompt_name]
        if input_type is None:
            return files.default_prompt
        prompt = files.prompt_of_type(input_type)
        if prompt is None:
            known = ", ".join([*INPUT_TYPES, *files.prompts])
            raise InvalidRequestError(
                f"input_type: {input_type[:100]!r} is not known (known: {known})", param="input_type"
            )
        return prompt

    async def encode(
        self,
        texts: Sequence[str],
        prompt: str,
        *,
        max_tokens: int | None,
        add_special_tokens: bool = True,
        param: Callable[[int], str],
    ) -> list[EmbeddingInput]:
        """Texts, each behind `prompt`, as inputs of at most `max_tokens` or, if None, what the model takes.

        `param` gives what the request calls the text of that number.

        Raises:
            ContextLengthExceeded: one is longer than the model takes and the server does not cut.
        """
        num_prompt_tokens = 0
        if prompt:
            suffix = self._suffix_length() if add_special_tokens else 0
            num_prompt_tokens = len(self.tokenizer.encode(prompt, add_special_tokens)) - suffix
        inputs: list[EmbeddingInput] = []
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            part = [prompt + self._as_trained(text) for text in texts[start : start + TEXTS_AT_ONCE]]
            for ids in await asyncio.to_thread(self.tokenizer.encode_batch, part, add_special_tokens):
                num_trailing = self._suffix_length() if add_special_tokens else 0
                kept = self.fit(ids, max_tokens, num_trailing, param(len(inputs)))
                inputs.append(EmbeddingInput(kept, num_prompt_tokens))
        return inputs

    async def encode_pairs(
        self, query: str, documents: Sequence[str], *, max_tokens: int | None
    ) -> list[EmbeddingInput]:
        """The query with each document, for a cross-encoder; what is too long loses the document's end.

        Raises:
            ContextLengthExceeded: too long, and the server does not cut, or the query alone is.
        """
        inputs: list[EmbeddingInput] = []
        for start in range(0, len(documents), TEXTS_AT_ONCE):
            part = [(query, document) for document in documents[start : start + TEXTS_AT_ONCE]]
            for pair in await asyncio.to_thread(self.tokenizer.encode_pairs, part):
                excess = len(pair.token_ids) - self._limit(max_tokens)
                if excess > pair.num_second:
                    raise self._too_long(len(pair.token_ids) - pair.num_second, "query")
                param = f"documents[{len(inputs)}]"
                ids = self.fit(pair.token_ids, max_tokens, pair.num_trailing, param)
                types = cut(pair.token_types, len(ids), pair.num_trailing)
                inputs.append(EmbeddingInput(ids, token_types=types if any(types) else ()))
        return inputs

    def fit(self, token_ids: list[int], max_tokens: int | None, num_trailing: int, param: str) -> list[int]:
        """The ids, or, if there are too many, the first ones and the last `num_trailing`.

        Raises:
            ContextLengthExceeded: too many, and the server does not cut; the error names `param`.
        """
        limit = self._limit(max_tokens)
        if len(token_ids) > limit and max_tokens is None and not self._truncate:
            raise self._too_long(len(token_ids), param)
        return cut(token_ids, limit, num_trailing)

    def _limit(self, max_tokens: int | None) -> int:
        limit = self.info.max_model_len
        return limit if max_tokens is None else min(limit, max_tokens)

    def _too_long(self, num_tokens: int, param: str) -> ContextLengthExceeded:
        return ContextLengthExceeded(
            f"{param}: the model takes {self.info.max_model_len} tokens, and this has {num_tokens}",
            param=param,
        )

    def _as_trained(self, text: str) -> str:
        files = self.engine.sentence_files
        return text.lower() if files is not None and files.do_lower_case else text

    def _suffix_length(self) -> int:
        """Special tokens that the model's tokenizer puts after a text."""
        if self._num_trailing is None:
            # What both have in front comes before a text; the rest of the empty one's comes after it.
            empty, full = self.tokenizer.encode(""), self.tokenizer.encode("a")
            same = [one == other for one, other in zip(empty, full, strict=False)]
            num_leading = same.index(False) if False in same else len(same)
            self._num_trailing = len(empty) - num_leading
        return self._num_trailing


def cut(values: list[int], limit: int, num_trailing: int) -> list[int]:
    """All of `values`, or `limit` of them: the first ones, then the last `num_trailing`."""
    if len(values) <= limit:
        return values
    num_trailing = min(num_trailing, limit)
    return values[: limit - num_trailing] + values[len(values) - num_trailing :]
