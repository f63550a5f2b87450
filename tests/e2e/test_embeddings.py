"""MiniLM behind a real server: the official SDK, plain HTTP, and a worker that is killed at work."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from bench.server import ServerProcess
from tests.e2e.sdk import connect

pytestmark = pytest.mark.model

CONFIG = {"worker": {"backend": "playback"}, "embeddings": {"model": "demo:minilm", "nice": 0}}
TEXTS = [f"Sentence number {n} is about topic {n % 7}." for n in range(300)]


def test_vectors_over_the_sdk_and_through_a_workers_death(
    start: Callable[[dict[str, Any]], ServerProcess],
) -> None:
    server = start(CONFIG)
    assert "embeddings: demo:minilm, 384 dimensions, float32, inputs of 256 tokens" in server.output
    with connect(server) as client:
        assert [model.id for model in client.models.list()] == ["default", "demo:minilm"]
        # The SDK asks for base64 by itself.
        answer = client.embeddings.create(
            model="demo:minilm", input=["The cat sits outside", "A man is playing guitar"]
        )
        cat, guitar = (np.array(entry.embedding) for entry in answer.data)
        assert cat @ guitar == pytest.approx(0.0363, abs=1e-4) and answer.usage.prompt_tokens == 13
        floats = client.embeddings.create(
            model="default", input="The cat sits outside", encoding_format="float", dimensions=64
        )
        short = cat[:64] / np.linalg.norm(cat[:64])
        assert np.array(floats.data[0].embedding) @ short == pytest.approx(1, abs=1e-5)

    whole = httpx.post(f"{server.url}/v1/embeddings", json={"input": TEXTS}, timeout=60).json()
    answers = []

    def ask() -> None:
        answers.append(httpx.post(f"{server.url}/v1/embeddings", json={"input": TEXTS}, timeout=60))

    thread = threading.Thread(target=ask)
    thread.start()
    server.wait_until(lambda: server.status()["embeddings"]["num_running"] > 0, 10, "a batch")
    os.kill(server.status()["embeddings"]["pid"], signal.SIGKILL)
    thread.join()
    again = answers[0].json()
    assert answers[0].status_code == 200 and server.status()["embeddings"]["restarts"] == 1
    first, second = (np.array([row["embedding"] for row in data["data"]]) for data in (whole, again))
    assert (first * second).sum(axis=1) == pytest.approx(1, abs=1e-5)

    ranked = httpx.post(
        f"{server.url}/v1/rerank",
        json={
            "query": "What is the capital of France?",
            "documents": ["Bananas are yellow.", "Paris."],
            "top_n": 1,
        },
    ).json()
    assert ranked["results"][0]["index"] == 1


def test_a_model_that_is_not_there_is_said_and_ends_the_server() -> None:
    server = ServerProcess({**CONFIG, "embeddings": {"model": "/no/such/model"}})
    with pytest.raises(RuntimeError, match="exited with 2"):
        server.start()
    assert "embeddings.model '/no/such/model': there is no such file or folder" in server.output
