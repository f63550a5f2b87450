"""A tiny tokenizer folder and engines over a FakeWorker."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel

from mlxd.config import CacheConfig, Config, SchedulerConfig
from mlxd.engine.engine import Engine
from mlxd.errors import MlxdError
from tests.unit.engine.fake_worker import EOS, VOCAB_SIZE, FakeWorker


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token n is the text ` tn`, so that texts show tokens; EOS is 1."""
    folder = tmp_path_factory.mktemp("model")
    vocab = {f"t{n}": n for n in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="t0"))
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(
        json.dumps({"model_type": "fake", "eos_token_id": EOS, "max_position_embeddings": 128})
    )
    return folder


class Harness:
    """An engine and the workers it has started, newest last."""

    def __init__(self, config: Config, folder: Path, **options: Any) -> None:
        self.workers: list[FakeWorker] = []
        self.time = 0.0
        self.failures: list[MlxdError] = []

        def make(cfg: Config, on_message: Any, on_exit: Any) -> FakeWorker:
            worker = FakeWorker(cfg, on_message, on_exit, folder=str(folder), **options)
            self.workers.append(worker)
            return worker

        self.engine = Engine(
            config,
            make_executor=make,
            clock=lambda: self.time,
            draw_seed=lambda: 0,
            on_failed=self.failures.append,
        )

    @property
    def worker(self) -> FakeWorker:
        return self.workers[-1]

    async def until(self, condition: Callable[[], bool], turns: int = 20_000) -> None:
        """Let the loop turn until `condition`; fails when it does not come true."""
        import asyncio

        for _ in range(turns):
            if condition():
                return
            # Loading reads files in a thread: give it a moment of real time now and then.
            await asyncio.sleep(0)
        deadline = asyncio.get_running_loop().time() + 5
        while not condition():
            assert asyncio.get_running_loop().time() < deadline, "it did not happen"
            await asyncio.sleep(0.001)

    def is_ready(self) -> bool:
        try:
            self.engine.check_ready()
        except Exception:
            return False
        return True


@pytest.fixture
def harness(model_folder: Path) -> Callable[..., Any]:
    @asynccontextmanager
    async def make(
        scheduler: SchedulerConfig | None = None, *, cache: CacheConfig | None = None, **options: Any
    ) -> AsyncIterator[Harness]:
        config = Config(scheduler=scheduler or SchedulerConfig(max_num_seqs=8), cache=cache or CacheConfig())
        h = Harness(config, model_folder, **options)
        await h.engine.start()
        try:
            await h.until(h.is_ready, turns=50)
            yield h
        finally:
            await h.engine.stop(0)
            assert h.engine.stats.num_integrity_errors == 0

    return make
