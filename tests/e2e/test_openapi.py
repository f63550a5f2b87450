"""Schemathesis against a real server: no server error, no answer that /openapi.json does not describe.

A body that fits the schema may still be refused, for what no schema says. Every such 400 begins with the
field at fault; it is mended, and asked again, until the body is taken: refusals have to lead to an answer.
Behind every route is something that can answer: a model, a tiny one for embeddings, a real MCP server.

MLXD_OPENAPI_CASES=350 pytest -s tests/e2e/test_openapi.py tries that many cases for each operation and each
of the two modes (bodies that fit the schema, and bodies that do not), other ones every time, and says how
many they were in all.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from bench.server import ServerProcess
from mlxd.api.app import ROUTES
from mlxd.api.openapi import OPERATIONS
from tests.e2e.conftest import assert_empty
from tests.worker.embedding_folders import CONFIGS, VOCAB, random_weights, shapes, write_model

CASES = int(os.environ.get("MLXD_OPENAPI_CASES", "0"))
SOUND = {
    "messages": [{"role": "user", "content": "Hi"}],
    "prompt": "Hi",
    "input": "Hi",
    "query": "Hi",
    "documents": ["Hi"],
    "tokens": [1, 2],
    "max_tokens": 9,
    "tool_name": "sums__quote",
}
"""in place of a field that is at fault; others are left out, as is one at fault twice"""
KNOWN = {"model": "default", "tool_name": "sums__quote", "tool": None, "server": None}
"""names that fit the schema and that nobody has are nearly always answered with a 404"""
MAX_FAULTS = 20
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
CONFIG = {
    "worker": {"backend": "playback"},
    # Small, so that what asks for as much as it can get is soon over.
    "model": {"max_model_len": 256},
    "limits": {"max_choices": 4, "max_prompts": 4, "timeout_seconds": 10.0},
}


def write_embedding_model(folder: Path) -> None:
    """A tiny BERT that knows some words."""
    config = CONFIGS["bert"]
    write_model(folder, config, random_weights(shapes(config)))
    words = {word: number for number, word in enumerate(["[UNK]", "Hi", *map(str, range(VOCAB - 2))])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("openapi")
    script = Path(__file__).with_name("mcp_server.py")
    sums = {"command": sys.executable, "args": [str(script), "stdio"]}
    (folder / "servers.json").write_text(json.dumps({"mcpServers": {"sums": sums}}))
    write_embedding_model(folder / "bert")
    more = {"mcp": {"config": str(folder / "servers.json")}, "embeddings": {"model": str(folder / "bert")}}
    with ServerProcess(CONFIG | more) as server, httpx.Client(base_url=server.url) as http:
        server.wait_until(lambda: http.get("/v1/mcp/tools").json()["count"] > 0, 30.0, "its tools")
        yield server
        for pin in http.get("/v1/cache/pins").json()["data"]:
            assert http.delete(f"/v1/cache/pins/{pin['id']}").status_code == 200
        assert_empty(server)


@pytest.fixture(scope="module")
def schema(server: ServerProcess) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.fixture(scope="module")
def statuses() -> Iterator[Counter[int]]:
    """How often each status was answered."""
    counts: Counter[int] = Counter()
    yield counts
    print(f"\n{counts.total()} cases: " + ", ".join(f"{n} × {s}" for s, n in sorted(counts.items())))


def modes(method: str, path: str) -> list[GenerationMode]:
    """What can be tried: without a body there is nothing to get wrong, as any text may be an id."""
    known = OPERATIONS.get((method, path))
    has_body = known is not None and known.request is not None
    return list(GenerationMode) if has_body else [GenerationMode.POSITIVE]


@pytest.mark.timeout(120 + CASES)
@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [(method, path, mode) for method, path, _ in ROUTES for mode in modes(method, path)],
)
def test_answers_are_as_described(
    schema: Any, statuses: Counter[int], method: str, path: str, mode: GenerationMode
) -> None:
    operation = schema[path][method]

    @settings(
        max_examples=CASES or 12,
        derandomize=not CASES,
        deadline=None,
        phases=[Phase.generate],  # shrinking a body takes longer than finding it
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def call(case: Case) -> None:
        fits = mode is GenerationMode.POSITIVE and isinstance(case.body, dict)
        if isinstance(case.body, dict):
            case.body.pop("timeout", None)  # the client's own wish for a 504
            if fits:
                case.body |= {name: value for name, value in KNOWN.items() if name in case.body}
        faults: list[str] = []
        while True:
            response = case.call_and_validate(checks=CHECKS)
            statuses[response.status_code] += 1
            if not fits or response.status_code != 400:
                break
            faults.append(response.json()["error"]["message"])
            if " maximum " in faults[-1]:
                return  # more than the model reads, wherever it stands
            assert len(faults) <= MAX_FAULTS, faults
            mend(case.body, faults)
        assert not fits or response.status_code == 200

    call()


def mend(body: dict[str, Any], faults: list[str]) -> None:
    """Put right the field that the last of `faults` names."""
    fields = [match[0] if (match := re.match(r"\w+", fault)) else "" for fault in faults]
    field = fields[-1]
    if field in SOUND and field not in fields[:-1]:
        body[field] = SOUND[field]
    else:
        assert field in body, faults
        del body[field]
