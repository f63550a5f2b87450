"""The model as the API sees it: its names, tokenizer, template and defaults.

It does not know requests. All but the names is there only once the engine has loaded the model.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence

from mlxd import __version__
from mlxd.api.grammar_cache import GrammarCache
from mlxd.api.threads import off_loop_if
from mlxd.chat.format import ChatFormat
from mlxd.chat.template import ChatTemplate, no_chat_template
from mlxd.config import ChatConfig, ModelConfig, model_id
from mlxd.engine.engine import Engine
from mlxd.errors import ConfigError, InternalError, ModelNotFoundError, NotReadyError
from mlxd.step import WorkerReady
from mlxd.text.model_files import ModelFiles
from mlxd.text.tokenizer import Tokenizer

DEFAULT_NAME = "default"

INLINE_LENGTH = 8192
"""Characters or tokens above which (de)tokenising goes to a thread: `tokenizers` releases the GIL."""


class ServedModel:
    """One for a server. `created` is when it started (Unix).

    `names[0]` is what responses carry, `root` what the model is called whatever its names are. Requests may
    also give its `path`, which no answer tells.
    """

    __slots__ = (
        "_chat_config",
        "_chat_format",
        "_chat_format_files",
        "_engine",
        "_fingerprint",
        "created",
        "grammars",
        "names",
        "owned_by",
        "path",
        "root",
    )

    def __init__(self, config: ModelConfig, engine: Engine, created: int, *, chat: ChatConfig) -> None:
        self._engine = engine
        self._chat_config = chat
        self.created = created
        self.grammars = GrammarCache()
        self.owned_by = config.owned_by
        self.names: tuple[str, ...] = config.names or (DEFAULT_NAME,)
        self.path = config.path
        self.root = model_id(config.path) if config.path else self.names[0]
        self._chat_format: ChatFormat | None = None
        self._chat_format_files: ModelFiles | None = None
        self._fingerprint: tuple[WorkerReady, str] | None = None

    @property
    def name(self) -> str:
        return self.names[0]

    def check_name(self, asked: str | None) -> None:
        """A request may name any of the names, `default`, or nothing.

        Raises:
            ModelNotFoundError
        """
        if asked is None or asked in self.names or asked in (DEFAULT_NAME, self.root, self.path):
            return
        raise ModelNotFoundError(
            f"the model {asked[:200]!r} does not exist; this server has {', '.join(self.names)}",
            param="model",
        )

    @property
    def files(self) -> ModelFiles:
        """Raises NotReadyError until the worker has the files on disk."""
        files = self._engine.files
        if files is None:
            raise NotReadyError("the model is loading")
        return files

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises NotReadyError until it is loaded."""
        tokenizer = self._engine.tokenizer
        if tokenizer is None:
            raise NotReadyError("the model is loading")
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        info = self._engine.info
        return info.vocab_size if info is not None else self.tokenizer.vocab_size

    @property
    def keeps_states(self) -> bool:
        """Whether it has recurrent layers whose states are kept where prompts are likely to part."""
        return self._engine.keeps_states

    @property
    def max_model_len(self) -> int | None:
        """Prompt and generated tokens together; None while it is unknown."""
        info = self._engine.info
        if info is not None:
            return info.max_model_len
        files = self._engine.files
        return files.max_model_len if files is not None else None

    @property
    def fingerprint(self) -> str:
        """OpenAI's system_fingerprint: changes with the model, the device and the versions."""
        info = self._engine.info
        if info is None:
            raise NotReadyError("the model is loading")
        if self._fingerprint is None or self._fingerprint[0] is not info:
            facts = (self.path, __version__, info.device, info.dtype, sorted(info.versions.items()))
            digest = hashlib.blake2s(repr(facts).encode(), digest_size=5).hexdigest()
            self._fingerprint = (info, f"fp_{digest}")
        return self._fingerprint[1]

    async def chat_format(self) -> ChatFormat:
        """Template and parsers, made at their first use, in a thread because that takes tens of milliseconds.

        Raises:
            InvalidRequestError: the model has none.
            InternalError: it is not valid.
        """
        files = self.files
        if self._chat_format_files is not files:
            try:
                chat_format = await asyncio.to_thread(self._make_chat_format, files, self.tokenizer)
            except ConfigError as error:
                raise InternalError(f"the model's chat template cannot be used: {error}") from error
            self._chat_format, self._chat_format_files = chat_format, files
        if self._chat_format is None:
            raise no_chat_template()
        return self._chat_format

    def _make_chat_format(self, files: ModelFiles, tokenizer: Tokenizer) -> ChatFormat | None:
        template = ChatTemplate.from_files(files, tokenizer)
        if template is None:
            return None
        special_tokens = [tokenizer.token_text(token_id) for token_id in tokenizer.special_token_ids]
        return ChatFormat(self._chat_config, template, files.model_type, special_tokens)

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each text; long texts do not hold up the event loop."""
        tokenizer = self.tokenizer
        is_long = sum(map(len, texts)) > INLINE_LENGTH
        return await off_loop_if(is_long, lambda: tokenizer.encode_batch(texts, add_special_tokens))

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of `token_ids`; many of them do not hold up the event loop either."""
        tokenizer = self.tokenizer
        is_long = len(token_ids) > INLINE_LENGTH
        return await off_loop_if(is_long, lambda: tokenizer.decode(token_ids, skip_special_tokens))
