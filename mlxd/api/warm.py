"""Warm prompts: what a file names is computed once the worker is ready, for the first requests to find.

It does not know blocks or HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

import msgspec

from mlxd.api.caller import joined_salt
from mlxd.api.served_model import ServedModel
from mlxd.api.tokenize import PromptFields, encode_prompt
from mlxd.engine.engine import Engine
from mlxd.engine.request import GenerationRequest
from mlxd.errors import ConfigError, MlxdError, NotReadyError, WorkerError
from mlxd.named_file import read_named_file

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 64 * 1024 * 1024
MAX_PROMPTS = 10_000
MAX_SECONDS = 3600.0
"""for one prompt: clients come first"""


class WarmPrompt(PromptFields, forbid_unknown_fields=True, kw_only=True):
    """A line of the file: `prompt`, or `messages` (by default without what invites an answer), as for
    /tokenize. `cache_salt`: of the API key whose requests are to find it."""

    cache_salt: str = ""


def read_warm_prompts(path: Path) -> list[WarmPrompt]:
    """The lines of a JSONL file. Raises ConfigError, with the line."""
    raw = read_named_file(path, MAX_FILE_BYTES, "cache.warm_prompts")
    decoder = msgspec.json.Decoder(WarmPrompt)
    prompts: list[WarmPrompt] = []
    for number, line in enumerate(raw.splitlines(), 1):
        if not line.strip():
            continue
        try:
            prompt = decoder.decode(line)
        except (msgspec.DecodeError, RecursionError) as error:
            raise ConfigError(f"cache.warm_prompts: {path}:{number}: {error}") from None
        if (prompt.prompt is None) == (prompt.messages is None):
            raise ConfigError(f"cache.warm_prompts: {path}:{number}: give either prompt or messages")
        prompts.append(prompt)
    if len(prompts) > MAX_PROMPTS:
        raise ConfigError(f"cache.warm_prompts: {path}: at most {MAX_PROMPTS} prompts, not {len(prompts)}")
    return prompts


class Warmer:
    """Computes the prompts each time a worker is ready; a run under way when its worker dies begins anew."""

    def __init__(self, prompts: Sequence[WarmPrompt], engine: Engine, model: ServedModel) -> None:
        self._prompts = prompts
        self._engine = engine
        self._model = model
        self._task: asyncio.Task[int] | None = None
        engine.on_each_ready(self._start)

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _start(self) -> None:
        self.stop()
        self._task = asyncio.get_running_loop().create_task(warm(self._prompts, self._engine, self._model))


async def warm(prompts: Sequence[WarmPrompt], engine: Engine, model: ServedModel) -> int:
    """Compute each, one after another, while no client waits; returns how many tokens they have.

    One that cannot be is logged and left out.
    """
    num_tokens = 0
    for number, prompt in enumerate(prompts, 1):
        if prompt.add_generation_prompt is None:
            prompt.add_generation_prompt = False
        try:
            token_ids = await encode_prompt(prompt, model)
            request = GenerationRequest(
                request_id=f"warm.{number}",
                prompt_token_ids=token_ids,
                max_tokens=0,
                background=True,
                timeout_seconds=MAX_SECONDS,
                cache_salt=joined_salt(prompt.cache_salt, ""),
            )
            await engine.submit([request]).drain()
        except (NotReadyError, WorkerError):
            return num_tokens  # it is begun anew once the worker is ready again
        except MlxdError as error:
            logger.warning("warm prompt %d: %s", number, error)
        else:
            num_tokens += len(token_ids)
    logger.info("%d warm prompts are cached, with %d tokens", len(prompts), num_tokens)
    return num_tokens
