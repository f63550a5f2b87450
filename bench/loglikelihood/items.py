"""A made-up task, and its log-likelihoods by three ways: lm-eval, its requests sent from here, and mlx-lm.

It does not know who compares them.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from tokenizers import Tokenizer

from bench.report import ROOT
from bench.serve.workload import WORDS

HARNESS = Path(__file__).parent / "harness.py"
NUM_CHOICES = 4
FACTS = (
    ("The capital of France is", " Paris", " London", " a cheese", " Marseille"),
    ("Two plus two equals", " four", " five", " fish", " twenty-two"),
    ("Water boils at one hundred degrees", " Celsius", " Kelvin", " of freedom", " on the moon"),
    ("def add(a, b):\n    return", " a + b", " a - b", " None", " b"),
)

Pair = tuple[list[int], list[int]]
Score = tuple[float, bool]


def make_docs(count: int, seed: int) -> list[dict[str, Any]]:
    """`{"context", "choices"}`: some facts, then words at random, of 5 to 200 words."""
    rng = random.Random(seed)
    docs = [{"context": context, "choices": [c.strip() for c in choices]} for context, *choices in FACTS]
    while len(docs) < count:
        words = rng.choices(WORDS, k=rng.choice((5, 20, 60, 200)))
        choices = [" ".join(rng.choices(WORDS, k=rng.randrange(1, 8))) for _ in range(NUM_CHOICES)]
        docs.append({"context": " ".join(words), "choices": choices})
    return docs[:count]


def pairs_of(docs: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(context, continuation) of each choice, as lm-eval makes them."""
    return [(doc["context"], " " + choice) for doc in docs for choice in doc["choices"]]


def encode(pairs: list[tuple[str, str]], folder: Path) -> list[Pair]:
    """Token ids, cut where the context's own tokens end, as lm-eval does."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoded: list[Pair] = []
    for context, continuation in pairs:
        head: list[int] = tokenizer.encode(context, add_special_tokens=False).ids
        whole: list[int] = tokenizer.encode(context + continuation, add_special_tokens=False).ids
        encoded.append((head, whole[len(head) :]))
    return encoded


def ask_server(url: str, pairs: list[Pair], batch_size: int = 8) -> list[Score]:
    """The requests of lm-eval's local-completions, and what it makes of the answers."""
    scores: list[Score] = []
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        payload = {
            "model": "default",
            "prompt": [[*context, *continuation] for context, continuation in batch],
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": 1,
            "seed": 1234,
            "echo": True,
        }
        headers = {"content-type": "application/json"}
        with urlopen(Request(f"{url}/v1/completions", json.dumps(payload).encode(), headers)) as response:
            choices = json.load(response)["choices"]
        for (context, _), choice in zip(batch, choices, strict=True):
            logprobs = choice["logprobs"]["token_logprobs"][len(context) : -1]
            top = choice["logprobs"]["top_logprobs"][len(context) : -1]
            greedy = all(value == max(best.values()) for value, best in zip(logprobs, top, strict=True))
            scores.append((sum(logprobs), greedy))
    return scores


def ask_lm_eval(python: str, url: str, docs: list[dict[str, Any]], folder: Path) -> dict[Any, Score]:
    """By (context, continuation). Raises CalledProcessError with lm-eval's output."""
    with tempfile.TemporaryDirectory() as temporary:
        given, out = Path(temporary) / "docs.json", Path(temporary) / "out.json"
        given.write_text(json.dumps(docs))
        command = [python, str(HARNESS), url, str(folder), str(given), str(out)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        rows = json.loads(out.read_text())
    return {(context, continuation): (total, greedy) for context, continuation, total, greedy in rows}


def ask_mlx_lm(pairs: list[Pair], folder: Path) -> list[Score]:
    """mlx-lm's own, from a process that imports MLX."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.loglikelihood.reference", str(folder)],
        input=json.dumps(pairs),
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return [(total, greedy) for total, greedy in json.loads(done.stdout)]
