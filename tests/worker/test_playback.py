"""Playback: the marked text comes out whole whatever the steps look like, and the pace is kept."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mlxd.config import Config, ModelConfig, SchedulerConfig, WorkerConfig
from mlxd.errors import ConfigError
from mlxd.step import Message, ModelFiles, SamplingParams, TokenLogprobs
from mlxd.worker.playback import PARAGRAPH, PlaybackBackend, Player, Script, played_text
from mlxd.worker.playback_tokenizer import END_OF_TURN, playback_folder
from tests.worker.worker_plans import Row, slot_init, step_plan, tokens_of

BLOCK_SIZE = 4


@dataclass
class FakeTime:
    now: float = 50.0
    slept: list[float] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(round(seconds, 6))
        self.now += seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXD_CACHE", str(tmp_path_factory.mktemp("cache")))
        return playback_folder()


def echo(prompt: list[int]) -> np.ndarray:
    """A script that depends on every token of the prompt."""
    return np.array([sum(prompt), len(prompt), 0], dtype=np.int32)


def player(
    script: Callable[[list[int]], np.ndarray] = echo,
    time: FakeTime | None = None,
    pace: float = 0.0,
    num_blocks: int = 64,
) -> Player:
    time = time or FakeTime()
    return Player(
        script,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_num_seqs=8,
        seconds_per_token=pace,
        clock=time.clock,
        sleep=time.sleep,
    )


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("x<<<play>>>a b<<<end>>>y", "a b"),
        ("<<<play>>>old<<<end>>> and <<<play>>>new<<<end>>>", "new"),
        ("<<<play>>><<<end>>>", ""),
        ("<<<end>>> nothing to play", PARAGRAPH),
        ("<<<play>>> no end", PARAGRAPH),
    ],
)
def test_the_text_between_the_last_marks(prompt: str, text: str) -> None:
    assert played_text(prompt) == text


@settings(max_examples=50)
@given(
    text=st.text(st.characters(exclude_characters="<", codec="utf-8"), max_size=40), seed=st.integers(0, 9999)
)
def test_chunks_preemption_and_copies_change_nothing(folder: Path, text: str, seed: int) -> None:
    """Random chunk sizes and blocks; after a random number of tokens the request moves to others."""
    rng = random.Random(seed)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompt = tokenizer.encode(f"<<<play>>>{text}<<<end>>>").ids
    backend = player(Script(folder), num_blocks=200)
    out: list[int] = []
    step_id = 0
    while not out or out[-1] != END_OF_TURN:
        # Admitted (again): everything known so far is prefilled, in chunks, into new blocks.
        tokens = prompt + out
        blocks = rng.sample(range(1, 200), len(tokens) // BLOCK_SIZE + 8)
        done, admit = 0, [slot_init(1, len(prompt))]
        while done < len(tokens):
            step_id += 1
            start, done = done, rng.randint(done + 1, len(tokens))
            row = Row(1, blocks, done, tokens[start:done], sample=done == len(tokens))
            answer = backend.launch(step_plan(step_id, [row], BLOCK_SIZE, admit=admit)).result()
            admit = []
        out += tokens_of(answer.token_ids)
        for _ in range(rng.randint(0, 20)):
            if out[-1] == END_OF_TURN:
                break
            step_id += 1
            row = Row(1, blocks, len(prompt) + len(out))
            out += tokens_of(backend.launch(step_plan(step_id, [row], BLOCK_SIZE)).result().token_ids)
    assert tokenizer.decode(out[:-1]) == text


def test_the_prompt_is_read_through_the_pool() -> None:
    """A second request whose first blocks are shared or copied sees the tokens that the first one wrote."""
    backend = player()
    first = Row(0, [3, 5], 6, [1, 2, 3, 4, 5, 6])
    assert tokens_of(
        backend.launch(step_plan(1, [first], BLOCK_SIZE, admit=[slot_init(0, 6)])).result().token_ids
    ) == [21]
    sharing = Row(1, [3, 9], 6, [70, 80])
    copied = Row(2, [11, 5], 6, [7, 8])
    plan = step_plan(
        2, [sharing, copied], BLOCK_SIZE, admit=[slot_init(1, 6), slot_init(2, 6)], copy_blocks=[(3, 11)]
    )
    assert tokens_of(backend.launch(plan).result().token_ids) == [160, 25]


def test_rows_that_are_not_sampled_give_no_token() -> None:
    backend = player()
    plan = step_plan(
        1,
        [Row(0, [1], 2, [5, 6], sample=False), Row(3, [2], 1, [9])],
        BLOCK_SIZE,
        admit=[slot_init(0, 3), slot_init(3, 1)],
    )
    assert tokens_of(backend.launch(plan).result().token_ids) == [9]
    plan = step_plan(2, [Row(0, [1], 3, [7]), Row(3, [2], 2)], BLOCK_SIZE)
    assert tokens_of(backend.launch(plan).result().token_ids) == [1, 18]  # decode rows come first


def test_a_plan_is_launched_before_the_result_is_read() -> None:
    backend = player()
    steps = [backend.launch(step_plan(1, [Row(0, [1, 2], 2, [4, 4])], BLOCK_SIZE, admit=[slot_init(0, 2)]))]
    steps += [backend.launch(step_plan(n, [Row(0, [1, 2], n + 1)], BLOCK_SIZE)) for n in (2, 3, 4)]
    assert [tokens_of(step.result().token_ids)[0] for step in steps] == [8, 2, 0, 8]  # and anew after its end


def test_logprobs_for_those_who_asked() -> None:
    backend = player()
    sampling = [SamplingParams(), SamplingParams(logprobs=0), SamplingParams(logprobs=3)]
    rows = [Row(slot, [slot + 1], 1, [40 + slot]) for slot in range(3)]
    admit = [slot_init(slot, 1, params) for slot, params in enumerate(sampling)]
    answer = backend.launch(step_plan(1, rows, BLOCK_SIZE, admit=admit)).result()
    assert answer.logprobs == (None, TokenLogprobs(0.0, 1), TokenLogprobs(0.0, 1, (42,), (0.0,)))
    assert backend.launch(step_plan(2, [Row(0, [1], 2)], BLOCK_SIZE)).result().logprobs == ()


def test_long_scripts_do_not_disturb_the_others() -> None:
    def script(prompt: list[int]) -> np.ndarray:
        return np.arange(prompt[0], dtype=np.int32)

    backend = player(script)
    rows = [Row(0, [1, 2], 1, [100]), Row(1, [3, 4], 1, [5000])]
    backend.launch(step_plan(1, rows, BLOCK_SIZE, admit=[slot_init(0, 1), slot_init(1, 1)]))
    rows = [Row(0, [1, 2], 3), Row(1, [3, 4], 3)]
    assert tokens_of(backend.launch(step_plan(2, rows, BLOCK_SIZE)).result().token_ids) == [2, 2]


def test_each_request_keeps_its_pace() -> None:
    time = FakeTime()
    backend = player(time=time, pace=0.5)
    backend.launch(step_plan(1, [Row(0, [1, 2], 1, [3])], BLOCK_SIZE, admit=[slot_init(0, 1)])).result()
    assert time.slept == []
    time.now += 0.2
    backend.launch(step_plan(2, [Row(0, [1, 2], 2)], BLOCK_SIZE)).result()
    assert time.slept == [0.3]
    # A newcomer's first token waits for the step, not for half a second of its own.
    rows = [Row(0, [1, 2], 3), Row(1, [5], 1, [9])]
    backend.launch(step_plan(3, rows, BLOCK_SIZE, admit=[slot_init(1, 1)])).result()
    assert time.slept == [0.3, 0.5]
    time.now += 7
    backend.launch(step_plan(4, [Row(0, [1, 2], 4)], BLOCK_SIZE)).result()
    assert time.slept == [0.3, 0.5]


def test_ready_without_any_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXD_CACHE", str(tmp_path))
    sent: list[Message] = []
    config = Config(worker=WorkerConfig(backend="playback"), scheduler=SchedulerConfig(max_num_seqs=2))
    ready = PlaybackBackend(config, sent.append).load()
    assert (ready.model_type, ready.vocab_size, ready.max_model_len) == ("playback", 259, 131072)
    assert ready.num_blocks == 1 + 2 * 131072 // 16
    (files,) = sent
    assert isinstance(files, ModelFiles)
    tokenizer = Tokenizer.from_file(f"{files.path}/tokenizer.json")
    assert tokenizer.encode("é<|im_end|>").ids == [0xC3, 0xA9, END_OF_TURN]


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "x", "max_position_embeddings": 8, "eos_token_id": 1}'
    )
    config = Config(worker=WorkerConfig(backend="playback"), model=ModelConfig(path=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        PlaybackBackend(config, lambda _: None).load()


def test_playback_does_without_mlx() -> None:
    code = "import sys, mlxd.worker.main, mlxd.worker.playback; print('mlx' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "False"
