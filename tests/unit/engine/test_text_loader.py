"""Reading a model's text files: once a folder, in a thread, with one outcome."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

from mlxd.engine.text_loader import TextLoader
from mlxd.errors import ConfigError, MlxdError

ONE, TWO = Path("/one"), Path("/two")


class Loading:
    """A loader whose reading of a folder goes on when `may_read` is set, and what came of it."""

    def __init__(self, error: Exception | None = None) -> None:
        self.read: list[Path] = []
        self.loaded: list[Path] = []
        self.failed: list[MlxdError] = []
        self.may_read = threading.Event()
        self.error = error
        self.loader = TextLoader(self._read, on_loaded=self.loaded.append, on_failed=self.failed.append)

    def _read(self, folder: Path) -> Path:
        self.read.append(folder)
        assert threading.current_thread() is not threading.main_thread()
        assert self.may_read.wait(10)
        if self.error is not None:
            raise self.error
        return folder

    async def finish(self) -> None:
        self.may_read.set()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.wait(tasks, timeout=10)


def test_a_folder_is_read_once() -> None:
    async def main() -> None:
        h = Loading()
        h.loader.load(ONE)
        h.loader.load(ONE)
        await h.finish()
        assert (h.read, h.loaded, h.failed) == ([ONE], [ONE], [])
        h.loader.load(ONE)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


def test_another_folder_takes_its_place() -> None:
    async def main() -> None:
        h = Loading()
        h.loader.load(ONE)
        await asyncio.sleep(0)
        h.loader.load(TWO)
        await h.finish()
        assert h.loaded == [TWO]

    asyncio.run(main())


def test_nothing_comes_of_it_once_it_was_stopped() -> None:
    async def main() -> None:
        h = Loading()
        h.loader.load(ONE)
        await asyncio.sleep(0)
        h.loader.stop()
        await h.finish()
        assert (h.loaded, h.failed) == ([], [])

    asyncio.run(main())


def test_what_is_wrong_is_told_without_internals() -> None:
    async def main(error: Exception) -> list[MlxdError]:
        h = Loading(error)
        h.loader.load(ONE)
        await h.finish()
        assert h.loaded == []
        h.loader.load(ONE)
        await h.finish()
        assert h.read == [ONE, ONE] and len(h.failed) == 2, "it may be there by now"
        return h.failed[:1]

    known = ConfigError("no tokenizer.json")
    assert asyncio.run(main(known)) == [known]
    [error] = asyncio.run(main(ValueError("/secret/path")))
    assert "secret" not in str(error) and "tokenizer" in str(error)
