"""/v1/embeddings and /v1/rerank over an embedding engine whose worker is in the test's own process."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import shutil
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
import tokenizers
from prometheus_client import CollectorRegistry, generate_latest
from tokenizers import models, pre_tokenizers, processors

from mlxd.api.app import App, create_app
from mlxd.api.metrics import EmbeddingCollector, TrafficCollector
from mlxd.api.openai import responses as openai
from mlxd.api.responses import Ranking
from mlxd.config import Config
from mlxd.engine.embedding_engine import EmbeddingEngine
from mlxd.step import EmbedBatch, EmbedderReady, EmbedResult, ModelFiles
from tests.unit.api.fakes import NOW, FakeEngine, Wire, call, client, make_app, until

WORDS = ["<s>", "</s>", "?", "query:", "a", "b", "c", "d"]
"""Their ids are their places; a text is wrapped in the first two."""
LIMIT = 8
SIZE = 4
PATH = "/v1/embeddings"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("embedder")
    tokenizer = tokenizers.Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="?")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    prompts = {"prompts": {"query": "query: ", "document": "", "odd": "d "}, "default_prompt_name": None}
    (path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    return path


class FakeEmbedder:
    """A vector counts the tokens 4 to 7 of its text, a cross-encoder's score the 4s of the second text."""

    is_open = True

    def __init__(self, on_message: Any, folder: Path, *, cross: bool) -> None:
        self.on_message, self.folder, self.cross = on_message, folder, cross
        self.batches: list[EmbedBatch] = []
        self.hold = False

    async def start(self) -> None:
        self.on_message(ModelFiles(str(self.folder)))
        size = 1 if self.cross else SIZE
        self.on_message(EmbedderReady(1, "bert", len(WORDS), LIMIT, size, self.cross, "cpu", "float32"))

    def send(self, message: Any) -> None:
        if isinstance(message, EmbedBatch):
            self.batches.append(message)
            if not self.hold:
                asyncio.get_running_loop().call_soon(self.answer, message)

    def answer(self, batch: EmbedBatch) -> None:
        values: list[list[float]] = []
        start = 0
        tokens = struct.unpack(f"<{len(batch.token_ids) // 4}i", batch.token_ids)
        types = batch.token_types or bytes(len(tokens))
        for (length,) in struct.iter_unpack("<i", batch.lengths):
            row = list(zip(tokens[start : start + length], types[start : start + length], strict=True))
            start += length
            if self.cross:
                values.append([float(row.count((4, 1)))])
            else:
                values.append([float(sum(token == word for token, _ in row)) for word in range(4, 8)])
        self.on_message(EmbedResult(batch.batch_id, np.array(values, np.float32).tobytes(), 0.001))

    def kill(self) -> None: ...

    async def stop(self) -> None: ...


class Server:
    def __init__(self, folder: Path, settings: dict[str, Any], *, cross: bool) -> None:
        def make(config: Config, on_message: Any, on_exit: Any) -> FakeEmbedder:
            self.worker = FakeEmbedder(on_message, folder, cross=cross)
            return self.worker

        embeddings = {"model": "org/tiny-embedder", **settings.pop("embeddings", {})}
        config = msgspec.convert(
            {"model": {"path": "org/tiny-model"}, "embeddings": embeddings, **settings}, Config
        )
        self.engine = EmbeddingEngine(config, make_executor=make)
        numbers = iter(range(1, 1_000_000))
        self.app: App = create_app(
            config,
            FakeEngine(),  # type: ignore[arg-type]
            self.engine,
            now=lambda: NOW,
            new_id=lambda: f"{next(numbers):032x}",
        )


@asynccontextmanager
async def serving(
    folder: Path, *, cross: bool = False, **settings: Any
) -> AsyncIterator[tuple[Server, httpx.AsyncClient]]:
    server = Server(folder, settings, cross=cross)
    await server.engine.start()
    await until(lambda: server.engine.is_loaded)
    async with client(server.app) as http:
        yield server, http
    await server.engine.stop()


def play(
    folder: Path, script: Callable[[Server, httpx.AsyncClient], Awaitable[None]], **options: Any
) -> None:
    async def main() -> None:
        async with asyncio.timeout(20), serving(folder, **options) as (server, http):
            await script(server, http)

    asyncio.run(main())


def ask(folder: Path, body: Any, path: str = PATH, **options: Any) -> httpx.Response:
    """One request to a server of its own."""
    answers = []

    async def script(server: Server, http: httpx.AsyncClient) -> None:
        answers.append(await http.post(path, json=body))

    play(folder, script, **options)
    return answers[0]


def test_several_texts(folder: Path) -> None:
    response = ask(folder, {"input": ["a b a", "c"], "model": "org/tiny-embedder"})
    assert response.status_code == 200
    msgspec.json.decode(response.content, type=openai.EmbeddingList)
    assert response.json() == {
        "id": f"embd-{1:032x}",
        "object": "list",
        "created": int(NOW),
        "model": "org/tiny-embedder",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [2.0, 1.0, 0.0, 0.0]},
            {"object": "embedding", "index": 1, "embedding": [0.0, 0.0, 1.0, 0.0]},
        ],
        "usage": {"prompt_tokens": 8, "total_tokens": 8},
    }


@pytest.mark.parametrize(
    ("body", "expected", "num_tokens"),
    [
        ({"input": "a b", "model": None, "dimensions": None, "encoding_format": None}, [1, 1, 0, 0], 4),
        ({"input": [4, 4, 7]}, [2, 0, 0, 1], 3),
        ({"input": [4, 4, 7], "add_special_tokens": False}, [2, 0, 0, 1], 3),
        ({"input": [[6], [5]][0:1]}, [0, 0, 1, 0], 1),
        ({"input": [4.0, 5.0], "dimensions": 4.0}, [math.sqrt(0.5), math.sqrt(0.5), 0, 0], 2),
        ({"input": "a b", "add_special_tokens": False}, [1, 1, 0, 0], 2),
        ({"input": "a a a b", "dimensions": 2}, [3 / math.sqrt(10), 1 / math.sqrt(10)], 6),
        ({"input": "c", "dimensions": 2}, [0, 0], 3),
        ({"input": ""}, [0, 0, 0, 0], 2),
        # Too long: the end goes, the special token after it stays.
        ({"input": "a a a a a a b b b"}, [6, 0, 0, 0], 8),
        ({"input": "a b c d", "truncate_prompt_tokens": 4}, [1, 1, 0, 0], 4),
        ({"input": [4] * 9}, [8, 0, 0, 0], 8),
        ({"input": "a", "prompt_name": "odd"}, [1, 0, 0, 1], 4),
        ({"input": "a", "input_type": "query"}, [1, 0, 0, 0], 4),
        ({"input": "a", "input_type": "search_document"}, [1, 0, 0, 0], 3),
        ({"input": "a", "input_type": "odd"}, [1, 0, 0, 1], 4),
    ],
)
def test_what_may_be_asked(folder: Path, body: Any, expected: list[float], num_tokens: int) -> None:
    response = ask(folder, body)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["data"][0]["embedding"] == pytest.approx(expected)
    assert answer["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


def test_base64_is_little_endian_float32(folder: Path) -> None:
    answer = ask(folder, {"input": "a b b", "encoding_format": "base64"}).json()
    assert struct.unpack("<4f", base64.b64decode(answer["data"][0]["embedding"])) == (1.0, 2.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        ({}, 400, "input", "missing"),
        ({"input": []}, 400, "input", "at least one"),
        ({"input": ["a", [4]]}, 400, "input", "mixture"),
        ({"input": [4, "a"]}, 400, "input", "mixture"),
        ({"input": [[]]}, 400, "input", "no tokens"),
        ({"input": [8]}, 400, "input", "from 0 to 7"),
        ({"input": [4], "add_special_tokens": True}, 400, "add_special_tokens", "as they are"),
        ({"input": [[-1]]}, 400, "input[0][0]", "expected"),
        ({"input": ["a"] * 4}, 400, "input", "at most 3, got 4"),
        ({"input": "a", "dimensions": 5}, 400, "dimensions", "have 4, 5 were asked"),
        ({"input": "a", "dimensions": 0}, 400, "dimensions", "expected"),
        ({"input": "a", "encoding_format": "hex"}, 400, "encoding_format", "hex"),
        ({"input": "a", "truncate_prompt_tokens": 0}, 400, "truncate_prompt_tokens", "leaves nothing"),
        ({"input": "a", "prompt_name": "x"}, 400, "prompt_name", "it has query, document, odd"),
        ({"input": "a", "input_type": "x"}, 400, "input_type", "known: query, document"),
        ({"input": [4], "input_type": "query"}, 400, "input_type", "before texts"),
        ({"input": "a", "model": "org/tiny-model"}, 404, "model", "has org/tiny-embedder"),
    ],
)
def test_what_may_not(folder: Path, body: Any, status: int, param: str | None, message: str) -> None:
    response = ask(folder, body, embeddings={"max_inputs": 3})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["param"] == param and message in error["message"]


def test_too_long_is_refused_where_the_server_does_not_cut(folder: Path) -> None:
    options = {"embeddings": {"truncate": False}}
    for text in ("a a a a a a a", [4] * 9):
        response = ask(folder, {"input": text}, **options)
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "context_length_exceeded"
        assert "takes 8 tokens, and this has 9" in response.json()["error"]["message"]
        assert response.json()["error"]["param"] == "input"
    assert ask(folder, {"input": "a a a a a a"}, **options).status_code == 200
    cut = ask(folder, {"input": "a a a a a a a", "truncate_prompt_tokens": -1}, **options)
    assert cut.json()["usage"]["prompt_tokens"] == 8


def test_an_error_says_which_of_several_texts_it_is_about(folder: Path) -> None:
    long, many = "a a a a a a a", ["a"] * 70
    texts: list[tuple[Any, str]] = [
        (["a", long], "input[1]"),
        ([*many, long], "input[70]"),
        ([[4], [5] * 9], "input[1]"),
        ([[4], [5], []], "input[2]"),
        ([[4], [9]], "input[1]"),
    ]
    rankings = [(long, many, "query"), ("a", ["b", "c", long], "documents[2]")]

    async def check(http: httpx.AsyncClient, path: str, body: Any, param: str) -> None:
        error = (await http.post(path, json=body)).json()["error"]
        assert error["param"] == param and error["message"].startswith(f"{param}: "), error

    async def embeds(server: Server, http: httpx.AsyncClient) -> None:
        for given, param in texts:
            await check(http, PATH, {"input": given}, param)
        await ranks(server, http)

    async def ranks(server: Server, http: httpx.AsyncClient) -> None:
        for query, documents, param in [*rankings, ("a", [*many, long], "documents[70]")]:
            await check(http, "/v1/rerank", {"query": query, "documents": documents}, param)

    play(folder, embeds, embeddings={"truncate": False})
    play(folder, ranks, cross=True, embeddings={"truncate": False})


def test_a_prompts_tokens_are_told_to_the_worker(folder: Path) -> None:
    async def script(server: Server, http: httpx.AsyncClient) -> None:
        await http.post(PATH, json={"input": ["a", "b c"], "prompt_name": "odd"})
        # With the token before it, as sentence-transformers counts.
        assert struct.unpack("<2i", server.worker.batches[0].num_prompt_tokens) == (2, 2)

    play(folder, script)


def test_the_models_own_default_prompt(folder: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": {"always": "d d "}, "default_prompt_name": "always"})
    )
    (tmp_path / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    for body, expected in (
        ({"input": "A"}, [1, 0, 0, 2]),
        ({"input": "a", "input_type": "query"}, [1, 0, 0, 0]),
        ({"input": [4]}, [1, 0, 0, 0]),
    ):
        assert ask(tmp_path, body).json()["data"][0]["embedding"] == expected


def test_without_an_embedding_model() -> None:
    for path in (PATH, "/v1/rerank"):
        body = {"input": "a", "query": "a", "documents": ["b"]}
        response = call(make_app(FakeEngine()), "POST", path, json=body)
        assert response.status_code == 404
        assert "--embedding-model" in response.json()["error"]["message"]


def test_both_models_are_listed_and_ready(folder: Path) -> None:
    async def script(server: Server, http: httpx.AsyncClient) -> None:
        listed = (await http.get("/v1/models")).json()["data"]
        assert [entry["id"] for entry in listed] == ["org/tiny-model", "embed", "also"]
        assert listed[1]["max_model_len"] == LIMIT and listed[1]["root"] == "org/tiny-embedder"
        assert (await http.get("/v1/models/org/tiny-embedder")).json()["id"] == "embed"
        assert (await http.get("/v1/models/also")).json()["id"] == "also"
        assert (await http.get("/v1/models/default")).json()["id"] == "org/tiny-model"
        assert (await http.get("/health/ready")).status_code == 200
        status = (await http.get("/v1/status")).json()["embeddings"]
        assert status["model"] == "embed" and status["dimensions"] == SIZE
        for name in ("embed", "also", "org/tiny-embedder", "default"):
            answer = await http.post(PATH, json={"input": "a", "model": name})
            assert answer.json()["model"] == "embed"
        server.engine.tokenizer = None
        waiting = await http.get("/health/ready")
        assert waiting.status_code == 503 and "embedding model is loading" in waiting.text
        assert (await http.post(PATH, json={"input": "a"})).status_code == 503

    play(folder, script, embeddings={"served_names": ["embed", "also"]})


def test_many_texts_are_answered_in_their_order(folder: Path) -> None:
    texts = [" ".join(["a"] * (n % 6) + ["d"]) for n in range(700)]
    answer = ask(folder, {"input": texts}).json()["data"]
    assert [entry["index"] for entry in answer] == list(range(700))
    assert [entry["embedding"] for entry in answer] == [[n % 6, 0, 0, 1] for n in range(700)]


@pytest.mark.parametrize("how", ["disconnect", "cancel"])
def test_who_leaves_or_cancels_ends_the_work(folder: Path, how: str) -> None:
    async def script(server: Server, http: httpx.AsyncClient) -> None:
        server.worker.hold = True
        body = json.dumps({"input": ["a b"] * 4096}).encode()
        wire = Wire(server.app, "POST", PATH, body, x_request_id="mine", authorization="Bearer k")
        await until(lambda: len(server.worker.batches) == 2)
        assert server.engine.num_waiting > 0
        if how == "disconnect":
            wire.disconnect()
        else:
            key = {"authorization": "Bearer k"}
            stranger = await http.delete("/v1/requests/mine", headers={"authorization": "Bearer other"})
            assert stranger.status_code == 404
            assert (await http.delete("/v1/requests/mine", headers=key)).status_code == 200
        await wire.task
        assert server.engine.num_waiting == 0
        if how == "cancel":
            assert wire.status == 499
        else:
            assert wire.sent == []

    keys = [{"name": "me", "key": "k"}, {"name": "other", "key": "other"}]
    play(folder, script, embeddings={"max_inputs": 4096}, limits={"api_keys": keys})


def test_tokens_are_charged_and_counted(folder: Path) -> None:
    limits = {"api_keys": [{"name": "me", "key": "k", "token_rate_limit": 10}]}

    async def script(server: Server, http: httpx.AsyncClient) -> None:
        http.headers["authorization"] = "Bearer k"
        first = await http.post(PATH, json={"input": ["a b", "c d"]})
        assert first.status_code == 200 and first.headers["x-ratelimit-remaining-tokens"] == "2"
        refused = await http.post(PATH, json={"input": "a b"})
        assert refused.status_code == 429 and "prompt has 4" in refused.json()["error"]["message"]
        registry = CollectorRegistry()
        registry.register(TrafficCollector(server.app._services.traffic))
        registry.register(EmbeddingCollector(server.engine))
        page = generate_latest(registry).decode()
        assert 'mlxd_key_tokens_total{key="me",kind="prompt"} 8.0' in page
        assert 'mlxd_requests_total{endpoint="/v1/embeddings",finish_reason="",status="429"} 1.0' in page
        assert "mlxd_embedding_inputs_total 2.0" in page and "mlxd_embedding_worker_up 1.0" in page
        assert "mlxd_embedding_batch_tokens_sum 8.0" in page

    play(folder, script, limits=limits)


RERANK = {"query": "a", "documents": ["b", {"text": "a a c"}, "a d"]}


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
def test_reranking_with_an_embedding_model(folder: Path, path: str) -> None:
    response = ask(folder, RERANK, path)
    assert response.status_code == 200
    msgspec.json.decode(response.content, type=Ranking)
    answer = response.json()
    assert [entry["index"] for entry in answer["results"]] == [1, 2, 0]
    scores = [entry["relevance_score"] for entry in answer["results"]]
    assert scores == pytest.approx([2 / math.sqrt(5), 1 / math.sqrt(2), 0])
    assert answer["results"][0]["document"] == {"text": "a a c"}
    # The query goes behind the model's prompt for queries.
    assert answer["usage"] == {"prompt_tokens": 16, "total_tokens": 16}


def test_reranking_with_a_cross_encoder(folder: Path) -> None:
    async def script(server: Server, http: httpx.AsyncClient) -> None:
        body = {**RERANK, "top_n": 2, "return_documents": False, "model": "default"}
        answer = (await http.post("/v1/rerank", json=body)).json()
        assert answer["results"] == [
            {"index": 1, "relevance_score": 2.0},
            {"index": 2, "relevance_score": 1.0},
        ]
        assert answer["usage"]["total_tokens"] == 3 * 4 + 6
        # Too long: the document loses its end, and the query stays.
        long = {"query": "b b", "documents": ["a a a a a"]}
        answer = (await http.post("/v1/rerank", json=long)).json()
        assert answer["results"][0]["relevance_score"] == 3 and answer["usage"]["total_tokens"] == 8
        refused = await http.post("/v1/rerank", json={"query": "b b b b b b", "documents": ["a"]})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "query"
        refused = await http.post(PATH, json={"input": "a"})
        assert refused.status_code == 400 and "/v1/rerank" in refused.json()["error"]["message"]

    play(folder, script, cross=True)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize(
    ("query", "document", "param"), [("", "", "query"), ("", "a", "query"), ("a", " ", "documents[0]")]
)
def test_texts_without_tokens_never_reach_the_worker(
    folder: Path, tmp_path: Path, cross: bool, query: str, document: str, param: str
) -> None:
    """Of a tokenizer that adds no tokens of its own, as many decoders' do not."""
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    tokenizer = json.loads((bare / "tokenizer.json").read_text())
    (bare / "tokenizer.json").write_text(json.dumps({**tokenizer, "post_processor": None}))
    prompts = {"prompts": {"query": "", "document": ""}, "default_prompt_name": None}
    (bare / "config_sentence_transformers.json").write_text(json.dumps(prompts))

    async def script(server: Server, http: httpx.AsyncClient) -> None:
        body = {"query": query, "documents": [document]}
        response = await http.post("/v1/rerank", json=body)
        is_refused = not (query or document.strip()) or not cross
        assert (response.status_code == 400) == is_refused, response.text
        assert not is_refused or response.json()["error"]["param"] == param
        assert all(min(struct.unpack(f"<{len(b.lengths) // 4}i", b.lengths)) for b in server.worker.batches)

    play(bare, script, cross=cross)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"documents": ["a"]}, "query"),
        ({"query": "a"}, "documents"),
        ({"query": "a", "documents": []}, "documents"),
        ({"query": "a", "documents": ["a"] * 3}, "documents"),
        ({"query": "a", "documents": ["a"], "top_n": -1}, "top_n"),
        ({"query": "a", "documents": [{"body": "a"}]}, "documents[0].text"),
        ({"query": "a", "documents": ["a"], "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ],
)
def test_what_cannot_be_reranked(folder: Path, body: Any, param: str) -> None:
    response = ask(folder, body, "/v1/rerank", embeddings={"max_inputs": 3})
    assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text
