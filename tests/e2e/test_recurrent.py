"""The four standing tests (docs/architecture.md) over HTTP with a model of recurrent state: a tiny Qwen3.5.

The pool is so small that requests in company are preempted, and go on from states that were kept.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from bench.report import ROOT
from bench.server import ServerProcess
from tests.e2e.conftest import assert_empty
from tests.e2e.sdk import connect
from tests.e2e.test_standing import MAX_TOKENS, all_at_once, complete, complete_streamed, kill_midway

pytestmark = pytest.mark.slow

PROMPTS = [random.Random(length).choices(range(300), k=length) for length in (1, 5, 17, 30, 41)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recurrent") / "tiny-qwen3.5"
    command = [sys.executable, "-m", "tests.e2e.write_tiny_model", "qwen3_5", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    config = {
        "model": {"path": str(folder), "max_model_len": 150},
        "cache": {"num_blocks": 40, "block_size": 4},
        "scheduler": {"max_num_seqs": 8, "max_num_batched_tokens": 24},
    }
    with ServerProcess(config, ready_seconds=600) as server:
        yield server
        assert_empty(server)


@pytest.fixture(scope="module")
def texts(folder: Path) -> list[str]:
    """mlx-lm's own greedy answers."""
    command = [sys.executable, "-m", "tests.e2e.reference", str(folder)]
    asked = json.dumps([[prompt, MAX_TOKENS] for prompt in PROMPTS])
    done = subprocess.run(command, cwd=ROOT, input=asked, capture_output=True, text=True, check=True)
    texts = [" ".join(f"w{token}" for token in tokens) for tokens in json.loads(done.stdout)]
    assert len({*texts}) == len(PROMPTS) and all(len({*text.split()}) > 2 for text in texts)
    return texts


def test_greedy_alone_is_mlx_lms_also_from_states_that_were_kept(
    server: ServerProcess, texts: list[str]
) -> None:
    for prompt, text in zip(PROMPTS, texts, strict=True):
        for _ in range(2):
            [answer] = all_at_once(server, partial(complete, prompt=prompt))
            assert answer.text.split() == text.split()
    assert server.wait_idle()["worker"]["warnings"] == []


def test_a_conversation_is_the_same_with_and_without_what_was_kept(server: ServerProcess) -> None:
    def ask(prompt: list[int], salt: str) -> tuple[str, int]:
        with connect(server) as client:
            answer = client.completions.create(
                model="default", prompt=prompt, temperature=0, max_tokens=8, extra_body={"cache_salt": salt}
            )
        assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
        return answer.choices[0].text, answer.usage.prompt_tokens_details.cached_tokens or 0

    # Steps have 24 tokens at most: so many that states are kept on the way, whether or not prompts are cut.
    history = random.Random(9).choices(range(300), k=80)
    for turn in range(2):
        text, num_cached = ask(history, "a conversation's")
        assert (num_cached >= 32) == (turn > 0)
        assert ask(history, f"nobody's {turn}") == (text, 0)
        history += [int(word[1:]) for word in text.split()] + [turn] * 4
    assert server.wait_idle()["cache"]["snapshots"] > 0


def test_in_company_streamed_and_preempted_it_is_the_same(server: ServerProcess, texts: list[str]) -> None:
    before = server.status()["num_preempted"]
    greedy = [partial(way, prompt=prompt) for way in (complete, complete_streamed) for prompt in PROMPTS]
    noise = [
        partial(complete, prompt=prompt, temperature=1.5, seed=seed) for seed, prompt in enumerate(PROMPTS, 1)
    ]
    answers = all_at_once(server, *noise, *greedy)
    assert [answer.text.split() for answer in answers[len(noise) :]] == [text.split() for text in texts * 2]
    again = all_at_once(server, *reversed(noise))
    assert again == answers[: len(noise)][::-1]
    assert server.wait_idle()["num_preempted"] > before


def test_choices_go_on_from_one_prompt(server: ServerProcess, texts: list[str]) -> None:
    with connect(server) as client:
        answer = client.completions.create(
            model="default", prompt=PROMPTS[2], n=3, temperature=0, max_tokens=MAX_TOKENS
        )
    assert [choice.text.split() for choice in answer.choices] == [texts[2].split()] * 3


def test_a_workers_death_changes_nothing(server: ServerProcess) -> None:
    ways = [complete, partial(complete_streamed, seed=3, temperature=1.0)]
    asked = [partial(way, prompt=PROMPTS[1], max_tokens=80) for way in ways]
    undisturbed = all_at_once(server, *asked)
    kill = partial(kill_midway, server=server, num_requests=len(asked))
    *disturbed, killed = all_at_once(server, *asked, kill)
    assert killed.num_tokens < 80, "the worker died after the answers"
    assert disturbed == undisturbed
    assert server.wait_idle()["worker"]["restarts"] == 1
