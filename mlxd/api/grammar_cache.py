"""Grammars for the worker, compiled before a request is admitted: what is wrong with one is a 400.

It does not know dialects, or what the grammars say.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from mlxd.chat.argument_grammar import Notation, tool_grammar
from mlxd.chat.lark import LarkText
from mlxd.chat.structured import Grammar, compile_error
from mlxd.errors import InvalidRequestError
from mlxd.text.tokenizer import Tokenizer

NUM_KNOWN = 256
NUM_TOOLS = 1024
"""Tools, in each notation, whose grammars are kept: some kilobytes each."""


class GrammarCache:
    """Remembers which grammars compile: agents send the same few again and again."""

    __slots__ = ("_arguments", "_check", "_errors", "_text", "_tokenizer")

    def __init__(self, check: Callable[[str], str | None] = compile_error) -> None:
        self._check = check
        self._errors: OrderedDict[bytes, str | None] = OrderedDict()
        self._arguments: OrderedDict[tuple[bytes, Notation, bool], Grammar | None] = OrderedDict()
        self._text: LarkText | None = None
        self._tokenizer: Tokenizer | None = None

    async def text(self, tokenizer: Tokenizer) -> LarkText:
        """Writes texts with a tokenizer's special tokens. Made once: some have thousands of them."""
        text = self._text
        if text is None or tokenizer is not self._tokenizer:
            tokens = {tokenizer.token_text(token_id): token_id for token_id in tokenizer.control_token_ids}
            self._text = text = await asyncio.to_thread(LarkText, tokens)
            self._tokenizer = tokenizer
        return text

    async def check(self, grammar: str, param: str) -> None:
        """Compile it, unless it is known.

        Raises:
            InvalidRequestError: it cannot be enforced, with the reason; the error names `param`.
        """
        error = await self.error(grammar)
        if error is not None:
            raise InvalidRequestError(f"{param}: {error}", param=param)

    async def error(self, grammar: str) -> str | None:
        """Why it cannot be enforced; None where it can."""
        errors = self._errors
        key = _digest(grammar.encode())
        if key in errors:
            errors.move_to_end(key)
            return errors[key]
        error = await asyncio.to_thread(self._check, grammar)
        errors[key] = error
        if len(errors) > NUM_KNOWN:
            errors.popitem(last=False)
        return error

    async def arguments(
        self, notation: Notation, schema: Mapping[str, Any], text: LarkText, *, must_hold: bool
    ) -> Grammar | None:
        """As `tool_grammar`, remembered. All of it is for one model, and so is `text`."""
        key = (_digest(msgspec.json.encode(schema)), notation, must_hold)
        known = self._arguments
        if key in known:
            known.move_to_end(key)
            return known[key]
        known[key] = made = await asyncio.to_thread(tool_grammar, notation, schema, text, must_hold=must_hold)
        if len(known) > NUM_TOOLS:
            known.popitem(last=False)
        return made


def _digest(text: bytes) -> bytes:
    """Stands for a text that may be megabytes long."""
    return hashlib.blake2b(text, digest_size=32).digest()
