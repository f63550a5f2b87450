"""A worker without a model: it emits the text that the prompt asks for, at a set rate or at once.

It does not know MLX (only a GGUF file that was never converted brings it in, once). For tests of every output
path, and benches of the front alone: the text stands between PLAY and END in the last message; a prompt
without these gets a fixed paragraph; then comes the end-of-turn token.

Its KV pool holds token ids where a model's holds keys and values, written and read through the same slot
mapping, block tables and copies. So it needs no case for chunks, preemption or shared prefixes, and a mistake
in the front's block bookkeeping shows as a wrong text.
"""

from __future__ import annotations

import json
import os
import platform as host
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

import mlxd
from mlxd.config import Config
from mlxd.errors import ConfigError
from mlxd.step import (
    MemoryPlan,
    ModelFiles,
    PromptLogprobs,
    PromptRow,
    SlotInit,
    StepPlan,
    StepResult,
    TokenLogprobs,
    WorkerReady,
)
from mlxd.worker.backend import Send
from mlxd.worker.batch import table_starts
from mlxd.worker.disk.block_file import Bytes
from mlxd.worker.disk.open import open_disk_tier
from mlxd.worker.disk.tier import DiskTier
from mlxd.worker.memory import context_limit
from mlxd.worker.model_facts import context_length, read_config, text_config
from mlxd.worker.model_source import resolve_model
from mlxd.worker.playback_tokenizer import playback_folder
from mlxd.worker.step_loop import MemoryUse

PLAY, END = "<<<play>>>", "<<<end>>>"
PARAGRAPH = (
    "This is the playback worker: no model is loaded, and this paragraph is the answer to every prompt. "
    f"To have another text played, put it between {PLAY[:3]} play {PLAY[-3:]} and {END[:3]} end {END[-3:]} "
    "marks (without the spaces) in the last message. Numbers such as 3.14159, umlauts like ä, ö and ü, "
    "Ελληνικά, 日本語 and an emoji 🙂 are here so that tokens cut characters in two."
)
MAX_POOL_TOKENS = 1 << 22
"""16 MiB of token ids"""

INT32_BYTES = 4

Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class PlayedStep:
    """A step whose tokens are known but may not be out before `due`."""

    answer: StepResult
    due: float
    clock: Callable[[], float]
    sleep: Callable[[float], None]

    def result(self) -> StepResult:
        delay = self.due - self.clock()
        if delay > 0:
            self.sleep(delay)
        return self.answer


class PlaybackBackend:
    """Implements backend.Backend."""

    def __init__(
        self,
        config: Config,
        send: Send,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._config = config
        self._send = send
        self._clock = clock
        self._sleep = sleep
        self._player: Player | None = None
        self.disk: DiskTier | None = None

    def load(self) -> WorkerReady:
        config = self._config
        if config.model.path is None:
            folder = playback_folder()
            self._announce(folder)
        else:
            folder = resolve_model(config.model, self._send, self._announce)
        facts = read_config(folder)
        max_model_len = context_limit(config, context_length(facts))
        block_size = config.cache.block_size
        most = 1 + config.scheduler.max_num_seqs * -(-max_model_len // block_size)
        num_blocks = config.cache.num_blocks or min(most, MAX_POOL_TOKENS // block_size)
        rate = config.worker.playback_tokens_per_second
        player = self._player = Player(
            Script(folder),
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=config.scheduler.max_num_seqs,
            seconds_per_token=1 / rate if rate else 0.0,
            clock=self._clock,
            sleep=self._sleep,
        )
        self.disk, warnings = open_disk_tier(
            config.cache,
            {"playback": facts, "versions": versions()},
            block_bytes=INT32_BYTES * block_size,
            mover=player,
            send=self._send,
        )
        return WorkerReady(
            pid=os.getpid(),
            model_type=str(facts["model_type"]),
            vocab_size=int(text_config(facts)["vocab_size"]),
            max_model_len=min(max_model_len, (num_blocks - 1) * block_size),
            num_blocks=num_blocks,
            block_size=block_size,
            memory=MemoryPlan(0, 0, 0, INT32_BYTES * num_blocks * block_size, INT32_BYTES),
            device="cpu (playback)",
            attention="playback",
            dtype="int32",
            versions=versions(),
            warnings=warnings,
            enforces_grammars=False,
            disk=self.disk.info if self.disk is not None else None,
        )

    def launch(self, plan: StepPlan) -> PlayedStep:
        assert self._player is not None
        return self._player.launch(plan)

    def memory(self) -> MemoryUse:
        return MemoryUse()

    def _announce(self, folder: Path) -> None:
        self._send(ModelFiles(str(folder.resolve())))


def versions() -> dict[str, str]:
    return {"mlxd": mlxd.__version__, "python": host.python_version()}


class Script:
    """Prompt tokens -> the tokens to play, the end-of-turn token last."""

    def __init__(self, folder: Path) -> None:
        try:
            self._tokenizer: Tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the bindings raise Exception itself
            raise ConfigError(
                f"playback needs a tokenizer.json, and {folder.name!r} has no usable one"
            ) from error
        self._end_token = end_of_turn(folder)
        self._encoded = lru_cache(maxsize=256)(self._encode)

    def __call__(self, prompt_token_ids: list[int]) -> Int32Array:
        """int32 [length]; always the same for the same prompt."""
        return self._encoded(played_text(self._tokenizer.decode(prompt_token_ids, skip_special_tokens=False)))

    def _encode(self, text: str) -> Int32Array:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return np.array([*ids, self._end_token], dtype=np.int32)


def played_text(prompt: str) -> str:
    """What the last PLAY … END of the prompt encloses, else PARAGRAPH."""
    start = prompt.rfind(PLAY)
    end = prompt.find(END, start)
    return PARAGRAPH if start < 0 or end < 0 else prompt[start + len(PLAY) : end]


def end_of_turn(folder: Path) -> int:
    """The (first) eos_token_id of generation_config.json or config.json."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.is_file():
            continue
        value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, int):
            return value
    raise ConfigError(f"the model {folder.name!r} names no eos_token_id")


def certain(rows: Sequence[PromptRow]) -> PromptLogprobs:
    """Every prompt token is as certain as the sampled ones."""
    tokens = b"".join(row.token_ids for row in rows)
    num_tokens = len(tokens) // 4
    zeros = bytes(len(tokens))
    has_top = any(row.num_top for row in rows)
    return PromptLogprobs(
        num_top=int(has_top),
        logprobs=zeros,
        ranks=np.ones(num_tokens, dtype="<i4").tobytes(),
        top_token_ids=tokens if has_top else b"",
        top_logprobs=zeros if has_top else b"",
    )


class Player:
    """Runs plans. State is per slot, in arrays, so that a step of 256 rows costs a few array operations."""

    def __init__(
        self,
        script: Callable[[list[int]], Int32Array],
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        seconds_per_token: float,
        clock: Callable[[], float],
        sleep: Callable[[float], None],
    ) -> None:
        self._script = script
        self._block_size = block_size
        self._seconds_per_token = seconds_per_token
        self._clock = clock
        self._sleep = sleep
        self._pool = np.zeros((num_blocks, block_size), dtype=np.int32)
        self._last_token = np.zeros(max_num_seqs, dtype=np.int32)
        self._num_prompt_tokens = np.zeros(max_num_seqs, dtype=np.int32)
        self._logprobs = np.full(max_num_seqs, -1, dtype=np.int32)
        self._due = np.zeros(max_num_seqs, dtype=np.float64)
        self._scripts = np.zeros((max_num_seqs, 256), dtype=np.int32)
        self._script_lens = np.zeros(max_num_seqs, dtype=np.int32)
        """0 until the slot's first sampled token, when its whole prompt is in the pool"""

    def launch(self, plan: StepPlan) -> PlayedStep:
        """Everything but the waiting."""
        for init in plan.admit:
            self._admit(init)
        for source, destination in plan.copy_blocks:
            self._pool[destination] = self._pool[source]
        slots = np.frombuffer(plan.slots, dtype=np.int32)
        context_lens = np.frombuffer(plan.context_lens, dtype=np.int32)
        inputs = np.concatenate(
            (self._last_token[slots[: plan.num_decode_rows]], np.frombuffer(plan.token_ids, dtype=np.int32))
        )
        self._pool.reshape(-1)[np.frombuffer(plan.slot_mapping, dtype=np.int32)] = inputs
        sampled = np.flatnonzero(np.frombuffer(plan.sample, dtype=np.uint8))
        rows = slots[sampled]
        unscripted = sampled[self._script_lens[rows] == 0]
        if unscripted.size:
            tables = np.frombuffer(plan.block_tables, dtype=np.int32)
            starts = table_starts(context_lens, self._block_size)
            for row in unscripted:
                self._write_script(int(slots[row]), tables[starts[row] : starts[row + 1]])
        # After the end-of-turn token the text begins anew: ignore_eos gets as many tokens as it asks for.
        positions = (context_lens[sampled] - self._num_prompt_tokens[rows]) % self._script_lens[rows]
        tokens = self._scripts[rows, positions]
        self._last_token[rows] = tokens
        answer = StepResult(
            plan.step_id,
            tokens.tobytes(),
            self._token_logprobs(rows, tokens),
            prompt_logprobs=certain(plan.prompt_rows) if plan.prompt_rows else None,
        )
        return PlayedStep(answer, self._pace(rows), self._clock, self._sleep)

    def read_blocks(self, block_ids: Sequence[int]) -> Callable[[], Bytes]:
        """uint8 [n, bytes of a block], as the plans so far left them."""
        copied = self._pool[list(block_ids)].view(np.uint8)
        return lambda: copied

    def write_blocks(self, block_ids: Sequence[int], payload: Bytes) -> None:
        self._pool[list(block_ids)] = payload.view(np.int32)

    def _admit(self, init: SlotInit) -> None:
        self._num_prompt_tokens[init.slot] = init.num_prompt_tokens
        self._logprobs[init.slot] = init.sampling.logprobs
        self._script_lens[init.slot] = 0
        self._due[init.slot] = 0.0

    def _write_script(self, slot: int, block_table: Int32Array) -> None:
        num_tokens = int(self._num_prompt_tokens[slot])
        blocks = block_table[: -(-num_tokens // self._block_size)]
        script = self._script(self._pool[blocks].reshape(-1)[:num_tokens].tolist())
        if script.size > self._scripts.shape[1]:
            wider = np.zeros((len(self._scripts), 2 * script.size), dtype=np.int32)
            wider[:, : self._scripts.shape[1]] = self._scripts
            self._scripts = wider
        self._scripts[slot, : script.size] = script
        self._script_lens[slot] = script.size

    def _token_logprobs(self, rows: Int32Array, tokens: Int32Array) -> tuple[TokenLogprobs | None, ...]:
        """Every token is certain: 0.0, rank 1, and itself as the one alternative where any is asked for."""
        asked = self._logprobs[rows]
        if not (asked >= 0).any():
            return ()
        return tuple(
            None if count < 0 else TokenLogprobs(0.0, 1, (token,), (0.0,)) if count else TokenLogprobs(0.0, 1)
            for count, token in zip(asked.tolist(), tokens.tolist(), strict=True)
        )

    def _pace(self, rows: Int32Array) -> float:
        """When the step's tokens may be out: when the last of its rows is due."""
        if not self._seconds_per_token or not rows.size:
            return 0.0
        due = max(self._clock(), float(self._due[rows].max()))
        self._due[rows] = due + self._seconds_per_token
        return due
