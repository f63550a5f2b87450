"""A small engine, tokenizer and client for tests of the API: no worker, no sockets, no clock.

The fake engine gives every sequence the outputs that its script says, one a turn of the event loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from mlxd.api.app import App, create_app
from mlxd.config import Config
from mlxd.engine.prompt_logprobs import PromptLogprobs
from mlxd.engine.request import FinishReason, GenerationRequest, RequestOutput
from mlxd.engine.request_log import is_of
from mlxd.engine.stats import EngineStats
from mlxd.engine.stream import OutputStream
from mlxd.errors import ContextLengthExceeded, MlxdError, NotReadyError
from mlxd.step import MemoryPlan, TokenLogprobs, WorkerReady
from mlxd.text.model_files import ModelFiles
from mlxd.text.tokenizer import Tokenizer
from tests.unit.engine.fake_worker import pack

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.name %}{{ m.name }}: {% endif %}"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
    "<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is false %}quick:{% endif %}{% endif %}"
)
END = 256
BOS = 257
MAX_MODEL_LEN = 4096
NOW = 1_700_000_000.75

Script = Callable[[GenerationRequest], Iterable[RequestOutput]]


def make_tokenizer() -> Tokenizer:
    """One token a byte, ids in the order of the alphabet; <|end|> is 256, <s> 257 (put before prompts)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return Tokenizer(tokenizer, bos_token="<s>", eos_token="<|end|>")


TOKENIZER = make_tokenizer()


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


FILES = ModelFiles(
    path=Path(__file__).parent / "tiny_model",
    config={},
    generation_config={},
    tokenizer_config={},
    special_tokens={"eos_token": "<|end|>"},
    chat_templates={"default": TEMPLATE},
    eos_token_ids=(END,),
    max_model_len=8192,
    model_type="tiny",
    default_temperature=None,
    default_top_p=None,
    default_top_k=None,
    default_min_p=None,
    default_repetition_penalty=None,
)

INFO = WorkerReady(
    pid=1,
    model_type="tiny",
    vocab_size=300,
    max_model_len=MAX_MODEL_LEN,
    num_blocks=64,
    block_size=16,
    memory=MemoryPlan(0, 0, 0, 0, 0),
    device="cpu",
    attention="gather",
    dtype="float32",
    versions={"mlx": "1"},
)


def says(
    text: str, *, finish: FinishReason = FinishReason.STOP, stop_reason: str | int | None = None
) -> Script:
    """A script: the tokens of `text` one by one, then its end (with the end token, unless cut by length)."""

    def script(request: GenerationRequest) -> Iterable[RequestOutput]:
        detokenizer = TOKENIZER.detokenizer(skip_special_tokens=request.skip_special_tokens)
        if request.max_tokens == 0:
            last = _output(request, "", None, 0)
            last.finish_reason = FinishReason.LENGTH
            yield last
            return
        token_ids = encode(text)
        ended_by_token = finish is FinishReason.STOP and not isinstance(stop_reason, str)
        for count, token_id in enumerate(token_ids, 1):
            yield _output(request, detokenizer.add(token_id), token_id, count)
        if ended_by_token:
            last = _output(request, "", END, len(token_ids) + 1)
        else:
            last = _output(request, "", None, len(token_ids))
        last.finish_reason, last.stop_reason = finish, stop_reason
        yield last

    return script


def fails(error: Exception, after: str = "") -> Script:
    """A script: the tokens of `after`, then `error`."""

    def script(request: GenerationRequest) -> Iterable[RequestOutput]:
        *outputs, _ = says(after)(request)
        yield from outputs
        yield RequestOutput(request.index, "", [], finish_reason=FinishReason.ERROR, error=error)

    return script


def _output(request: GenerationRequest, text: str, token_id: int | None, count: int) -> RequestOutput:
    """Token t has log-probability -t/100; its alternatives are t+1, t+2, … 0.5 less likely each."""
    logprobs: list[TokenLogprobs | None] | None = None
    asked = request.sampling.logprobs
    if asked >= 0 and token_id is not None:
        first = -token_id / 100
        top_ids = tuple(range(token_id, token_id + asked))
        top = tuple(first - 0.5 * k for k in range(asked))
        logprobs = [TokenLogprobs(first, 1, top_ids, top)]
    return RequestOutput(
        request.index,
        text,
        [] if token_id is None else [token_id],
        logprobs,
        num_prompt_tokens=len(request.prompt_token_ids),
        num_output_tokens=count,
        num_cached_tokens=1,
        prompt_logprobs=prompt_logprobs(request) if count <= 1 and request.prompt_logprobs >= 0 else None,
    )


def prompt_logprobs(request: GenerationRequest) -> PromptLogprobs:
    """Prompt token t has log-probability -t/64 and rank t; the best are 0, 1, 2, … with 0, -1/4, -1/2, …"""
    tokens = request.prompt_token_ids[1:]
    count = request.prompt_logprobs
    known = PromptLogprobs()
    if tokens:
        top = tuple(range(count)), tuple(-k / 4 for k in range(count))
        assert known.extend(1, pack([TokenLogprobs(-t / 64, t, *top) for t in tokens]), 0, len(tokens), count)
    return known


class FakeEngine:
    """What the API uses of `mlxd.engine.engine.Engine`."""

    def __init__(self, script: Script | None = None, *, files: ModelFiles = FILES) -> None:
        self.script = script or says("Hello")
        self.files: ModelFiles | None = files
        self.tokenizer: Tokenizer | None = TOKENIZER
        self.info: WorkerReady | None = INFO
        self.not_ready: MlxdError | None = None
        self.refusal: MlxdError | None = None
        self.restarting = False
        """the worker is gone, and another on its way"""
        self.unhealthy: str | None = None
        self.start_error: Exception | None = None
        self.queued = False
        """compute nothing of what is submitted; only with `held`"""
        self.held = False
        """give no outputs until release()"""
        self.stats = EngineStats()
        self.shares_prefixes = False
        self.keeps_states = False
        """let the API think that prompts are cached; then those that nobody waits for are submitted too"""
        self.submitted: list[GenerationRequest] = []
        self.timeouts_from: list[float | None] = []
        self.cancelled: list[str] = []
        self.calls: list[str] = []
        self._open: dict[str, tuple[OutputStream, deque[RequestOutput], GenerationRequest]] = {}

    @property
    def num_running(self) -> int:
        return len(self._open)

    async def start(self) -> None:
        self.calls.append("start")
        if self.start_error is not None:
            raise self.start_error

    async def stop(self, drain_seconds: float) -> None:
        self.calls.append("stop")

    def check_ready(self) -> None:
        if self.restarting:
            raise NotReadyError("the worker is restarting")
        if self.not_ready is not None:
            raise self.not_ready

    async def until_ready(self) -> None:
        self.calls.append("until_ready")
        while self.restarting:
            await asyncio.sleep(0)
        self.check_ready()

    def num_cached_tokens(self, token_ids: list[int], cache_salt: str) -> int:
        """Of prompts: answers are not cached."""
        known = [r.prompt_token_ids for r in self.submitted if r.cache_salt == cache_salt]
        return max((num_common(token_ids, other) for other in known), default=0)

    def health(self) -> tuple[bool, str]:
        return self.unhealthy is None, self.unhealthy or ""

    async def status(self) -> dict[str, object]:
        return {"status": "running", "num_running": self.num_running}

    def submit(
        self, requests: Sequence[GenerationRequest], *, timeout_from: float | None = None
    ) -> OutputStream:
        self.timeouts_from.append(timeout_from)
        self.check_ready()
        if self.refusal is not None:
            raise self.refusal
        for request in requests:
            if len(request.prompt_token_ids) >= MAX_MODEL_LEN:
                raise ContextLengthExceeded("too long", param="messages")
        self.submitted += requests
        loop = asyncio.get_running_loop()
        stream = OutputStream(len(requests), loop, on_cancel=self._on_cancel, on_drained=lambda stream: None)
        for request in requests:
            self._open[request.request_id] = (stream, deque(self.script(request)), request)
        if not self.queued:
            stream.begin()
        if not self.held:
            loop.call_soon(self._turn)
        return stream

    def release(self) -> None:
        self.held = False
        self._turn()

    def abort(self, request_id: str, client: str | None = None) -> bool:
        found = [
            key
            for key, (_, _, request) in self._open.items()
            if is_of(key, request_id) and client in (None, request.client)
        ]
        for key in found:
            self._abort(key, None)
        return bool(found)

    def end_all(self, error: MlxdError) -> None:
        self.not_ready = error
        self.abort_all(error)

    def abort_all(self, error: Exception) -> None:
        for key in list(self._open):
            self._abort(key, error)

    def _turn(self) -> None:
        for key, (stream, outputs, _) in list(self._open.items()):
            output = outputs.popleft()
            if output.finish_reason is not None:
                del self._open[key]
            stream.push(output)
        if self._open and not self.held:
            asyncio.get_running_loop().call_soon(self._turn)

    def _on_cancel(self, stream: OutputStream) -> None:
        for key, (owner, _, _) in list(self._open.items()):
            if owner is stream:
                self.cancelled.append(key)
                self._abort(key, None)

    def _abort(self, key: str, error: Exception | None) -> None:
        stream, _, request = self._open.pop(key)
        stream.push(RequestOutput(request.index, "", [], finish_reason=FinishReason.ABORT, error=error))


def num_common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(first), len(second)))


def make_app(engine: FakeEngine, config: dict[str, Any] | None = None, **kwargs: Any) -> App:
    """An app over a fake engine; ids count up from 1, the time stands still."""
    settings: dict[str, Any] = {"model": {"path": "org/tiny-model"}, **(config or {})}
    numbers = iter(range(1, 1_000_000))
    return create_app(
        msgspec.convert(settings, Config),
        engine,  # type: ignore[arg-type]
        **{"now": lambda: NOW, "new_id": lambda: f"{next(numbers):032x}", **kwargs},
    )


def client(app: App, **kwargs: Any) -> httpx.AsyncClient:
    """An httpx client straight into the app."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test", **kwargs)


def call(app: App, method: str, path: str, **kwargs: Any) -> httpx.Response:
    """One request in an event loop of its own."""

    async def once() -> httpx.Response:
        async with client(app) as http:
            return await http.request(method, path, **kwargs)

    return asyncio.run(once())


def with_defaults(**defaults: Any) -> ModelFiles:
    return replace(FILES, **defaults)


def sse_json(body: bytes) -> list[Any]:
    """The JSON of each frame; checks the framing and that [DONE] comes once, last."""
    *frames, rest = body.split(b"\n\n")
    assert rest == b"" and b"\r" not in body
    assert all(frame.startswith(b"data: ") and b"\n" not in frame for frame in frames)
    *chunks, done = [frame.removeprefix(b"data: ") for frame in frames]
    assert done == b"[DONE]"
    return [msgspec.json.decode(chunk) for chunk in chunks]


class Wire:
    """One request to an app as an ASGI server would make it, with the other end in the test's hands."""

    def __init__(self, app: App, method: str, path: str, body: bytes = b"", **headers: str) -> None:
        self.sent: list[dict[str, Any]] = []
        self.broken = False
        self.stall: asyncio.Future[None] | None = None
        """until it is done, the other end reads nothing"""
        self.is_stalled = False
        self._inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._inbox.put_nowait({"type": "http.request", "body": body, "more_body": False})
        raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": method, "path": path, "headers": raw, "root_path": ""}
        self.task = asyncio.get_running_loop().create_task(app(scope, self._inbox.get, self._send))

    async def _send(self, message: dict[str, Any]) -> None:
        if self.stall is not None:
            self.is_stalled = True
            await self.stall
        if self.broken:
            raise OSError("gone")
        self.sent.append(message)

    def disconnect(self) -> None:
        self._inbox.put_nowait({"type": "http.disconnect"})

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.sent[1:])


async def until(condition: Callable[[], bool]) -> None:
    """Turn the event loop until the condition holds; fails after ten seconds."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)
