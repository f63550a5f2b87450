"""Cached equals not cached on the real worker: greedy tokens of a tiny model in float32, token for token.

MLXD_CONVERSATIONS sets how many conversations (2,000 are issue 5's number; CI has time for fewer).
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from uuid import uuid4

import mlx.core as mx
import msgspec
import pytest
from mlx.utils import tree_flatten
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from mlxd.config import CacheConfig, Config, ModelConfig, SchedulerConfig, WorkerConfig
from mlxd.engine.cost import StepCostModel
from mlxd.engine.engine import Engine
from mlxd.engine.prefix_report import HitType
from mlxd.engine.request import FinishReason, GenerationRequest, RequestOutput
from mlxd.errors import MlxdError
from mlxd.step import GrammarSpec, SamplingParams
from tests.unit.engine.asking import ask, collect
from tests.unit.engine.conversations import Agents
from tests.worker.recurrent_models import RECURRENT
from tests.worker.tiny_models import VOCAB_SIZE, tiny_model

NUM_CONVERSATIONS = int(os.environ.get("MLXD_CONVERSATIONS", "60"))
MAX_LEN = 100
TIE = 1e-4
"""Log-probabilities closer than this are a tie: rounding differs with the shape of a matrix product."""


@pytest.fixture(scope="module", params=["llama-windows", "lfm2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama with a window in every other layer, or layers with a state beside attention, and random weights;
    token n is the word `tn`, EOS is 1."""
    path = tmp_path_factory.mktemp("tiny")
    model = tiny_model(request.param)
    mx.save_safetensors(str(path / "model.safetensors"), dict(tree_flatten(model.parameters())))
    facts = {key: value for key, value in vars(model.args).items() if value is not None}
    (path / "config.json").write_text(json.dumps({**facts, "eos_token_id": 1}))
    Tokenizer(WordLevel({f"t{n}": n for n in range(VOCAB_SIZE)}, unk_token="t0")).save(
        str(path / "tokenizer.json")
    )
    return path


@asynccontextmanager
async def engine(folder: Path, cache: CacheConfig, scheduler: SchedulerConfig) -> AsyncIterator[Engine]:
    """An engine with a worker process of its own, ready; nothing may be left over at the end."""
    ready = asyncio.Event()
    failures: list[MlxdError] = []
    config = Config(
        model=ModelConfig(path=str(folder)),
        cache=cache,
        scheduler=scheduler,
        worker=WorkerConfig(warmup=False, threads=1),
    )
    made = Engine(config, on_ready=lambda _: ready.set(), on_failed=failures.append)
    await made.start()
    try:
        await asyncio.wait_for(ready.wait(), 60)
        yield made
        assert made.requests() == []
        assert made.scheduler is not None and made.scheduler.kv.num_used_blocks == 0
        assert made.supervisor.num_restarts == 0
    finally:
        await made.stop(0)
    assert made.stats.num_integrity_errors == 0 and failures == []


Answered = set[tuple[tuple[int, ...], tuple[int, ...]]]
"""Prompts, each with tokens that answered it."""


def fail(request: GenerationRequest) -> GenerationRequest:
    """The worker refuses this row: it cannot read the grammar."""
    sampling = msgspec.structs.replace(request.sampling, grammar=GrammarSpec("no grammar"))
    return msgspec.structs.replace(request, sampling=sampling)


def remember(answered: Answered, request: GenerationRequest, output: RequestOutput) -> None:
    """Requests that were made to fail do, unless they left before; no other fails."""
    if output.finish_reason is FinishReason.ERROR:
        assert request.sampling.grammar is not None, output.error
    elif output.finish_reason is not FinishReason.ABORT:
        assert request.sampling.grammar is None
    if output.token_ids:
        answered.add((tuple(request.prompt_token_ids), tuple(output.token_ids)))


async def compare(alone: Engine, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> bool:
    """Whether the answer is the one without a cache, to the end; False where a tie parted them."""
    sampling = SamplingParams(temperature=0.0, logprobs=2)
    request = ask(uuid4().hex, list(prompt), len(tokens), sampling=sampling)
    output = (await collect(alone.submit([request])))[0]
    assert output.num_cached_tokens == 0
    if output.token_ids == list(tokens):
        return True
    at = next(i for i, token_id in enumerate(tokens) if output.token_ids[i : i + 1] != [token_id])
    assert output.logprobs is not None
    choices = output.logprobs[at]
    assert choices is not None and tokens[at] in choices.top_token_ids, (prompt, tokens, output.token_ids)
    assert choices.top_logprobs[0] - choices.top_logprobs[1] < TIE, (prompt, tokens, output.token_ids)
    return False


async def count_ties(alone: Engine, answered: Answered) -> int:
    """Compare them all, sixteen at a time; returns how many a tie parted."""
    queue = iter(sorted(answered))
    num_ties = 0

    async def client() -> None:
        nonlocal num_ties
        for prompt, tokens in queue:
            num_ties += not await compare(alone, prompt, tokens)

    await asyncio.gather(*(client() for _ in range(16)))
    return num_ties


@pytest.mark.timeout(60 + NUM_CONVERSATIONS)
def test_cached_equals_not_cached(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversations, eight at a time, over a pool that holds about three of them; then each answer again,
    by an engine that shares nothing and has room for all."""
    is_recurrent = json.loads((folder / "config.json").read_text())["model_type"] in RECURRENT
    num_conversations = NUM_CONVERSATIONS // 3 if is_recurrent else NUM_CONVERSATIONS
    if is_recurrent:  # prompts as short as these are cut for states that are kept only where that pays
        monkeypatch.setattr(StepCostModel, "exceeds_a_step", lambda *_: True)
    answered: Answered = set()

    async def main() -> None:
        config = SchedulerConfig(max_num_seqs=6, max_num_batched_tokens=48)
        async with engine(folder, CacheConfig(num_blocks=28, block_size=4), config) as shared:
            agents = Agents(
                shared,
                seed=5,
                max_len=MAX_LEN,
                vocab_size=VOCAB_SIZE,
                check=partial(remember, answered),
                fail=fail,
                pause=lambda: asyncio.sleep(0.003),
                sampling=SamplingParams(temperature=0.0),
            )
            await agents.talk(num_conversations)
            stats, num_evicted = shared.stats, shared.scheduler.kv.num_evicted_blocks
        plain = CacheConfig(num_blocks=600, prefix_caching=False)
        async with engine(folder, plain, SchedulerConfig(max_num_seqs=16)) as alone:
            num_ties = await count_ties(alone, answered)
            assert alone.num_preemptions == 0
        print(
            f"{num_conversations} conversations: {agents.num_answers} answers, {agents.num_left} left, "
            f"{agents.num_failed} failed; {num_evicted} blocks evicted, {shared.num_preemptions} preempted; "
            f"{stats.num_cached_tokens} of {stats.num_prompt_tokens} prompt tokens cached; {num_ties} ties"
        )
        assert agents.num_answers > agents.num_left > 0 and agents.num_failed > 0
        assert num_evicted > num_conversations and (shared.num_preemptions > 0 or is_recurrent)
        assert stats.num_cached_tokens > stats.num_prompt_tokens / 10
        assert {*stats.prefix_hits} == {*HitType} or is_recurrent
        assert num_ties <= len(answered) / 1000

    asyncio.run(main())
