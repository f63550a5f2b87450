"""Reads in a thread what a model's folder says of text: the tokenizer, and what goes with it.

It does not know which files these are, or who waits for them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from mlxd.errors import InternalError, MlxdError

logger = logging.getLogger(__name__)

T = TypeVar("T")


class TextLoader(Generic[T]):
    """One for an engine: `on_loaded` gets what `read` gives, or `on_failed` the reason, fit to be shown.

    A folder is read once, whoever names it again, unless that failed; another one (there is a newer revision)
    takes its place.
    """

    __slots__ = ("_folder", "_on_failed", "_on_loaded", "_read", "_task")

    def __init__(
        self,
        read: Callable[[Path], T],
        *,
        on_loaded: Callable[[T], None],
        on_failed: Callable[[MlxdError], None] | None,
    ) -> None:
        self._read = read
        self._on_loaded = on_loaded
        self._on_failed = on_failed
        self._folder: Path | None = None
        self._task: asyncio.Task[None] | None = None

    def load(self, folder: Path) -> None:
        """Begin to read it."""
        if folder != self._folder:
            self.stop()
            self._folder = folder
            self._task = asyncio.get_running_loop().create_task(self._load(folder))

    def stop(self) -> None:
        """Nobody wants any more what is being read."""
        if self._task is not None:
            self._task.cancel()

    async def _load(self, folder: Path) -> None:
        try:
            loaded = await asyncio.to_thread(self._read, folder)
        except MlxdError as error:
            self._fail(error)
        except Exception:
            logger.exception("could not read the model's tokenizer")
            self._fail(InternalError("the model's tokenizer could not be read"))
        else:
            self._on_loaded(loaded)

    def _fail(self, error: MlxdError) -> None:
        logger.error("%s", error)
        self._folder = None
        if self._on_failed is not None:
            self._on_failed(error)
