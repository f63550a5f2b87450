"""A chat with a model that thinks, over a real worker: what is computed ahead changes nothing."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mlxd.api.app import create_app
from mlxd.config import CacheConfig, SchedulerConfig
from tests.worker.test_prefix_cache import engine
from tests.worker.tiny_models import VOCAB_SIZE, tiny_model

NUM_TURNS = 4
MAX_TOKENS = 60
TEMPLATE = (
    "{%- for m in messages %}{%- set text = m.content %}"
    "{%- if '</think>' in text %}{%- set text = text.split('</think>')[-1] %}{%- endif %}"
    "{{- '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"
)
"""as that of Qwen3's thinking models"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3's architecture with random weights; a token is a byte."""
    path = tmp_path_factory.mktemp("thinker")
    model = tiny_model("qwen3", max_position_embeddings=4096)
    mx.save_safetensors(str(path / "model.safetensors"), dict(tree_flatten(model.parameters())))
    facts = {key: value for key, value in vars(model.args).items() if value is not None}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", *(f"<{n}>" for n in range(258, VOCAB_SIZE))])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "config.json").write_text(json.dumps({**facts, "eos_token_id": 257}))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


async def turn(http: httpx.AsyncClient, messages: list[Any], **fields: Any) -> tuple[str, str, int]:
    """Content and reasoning of the greedy answer, and how many of the prompt's tokens were computed."""
    body = {
        "messages": messages,
        "temperature": 0,
        "ignore_eos": True,
        "max_tokens": MAX_TOKENS,
        "thinking_token_budget": 12,
        **fields,
    }
    answer = (await http.post("/v1/chat/completions", json=body)).json()
    message, usage = answer["choices"][0]["message"], answer["usage"]
    computed = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
    return message["content"], message["reasoning"], computed


def test_a_chat_is_the_same_and_computes_what_is_new(folder: Path) -> None:
    async def main() -> None:
        cache = CacheConfig(num_blocks=600, block_size=4)
        async with engine(folder, cache, SchedulerConfig(max_num_seqs=4)) as made:
            app = create_app(made.config, made)
            transport = httpx.ASGITransport(app=app)
            messages: list[Any] = []
            async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as http:
                for number in range(NUM_TURNS):
                    messages.append({"role": "user", "content": f"Question {number}?"})
                    content, thought, computed = await turn(http, messages)
                    assert content and thought
                    alone = await turn(http, messages, cache_salt=f"nobody's {number}")
                    assert alone[:2] == (content, thought)
                    if number:
                        # The question and what asks for the answer; a few tokens where pieces meet.
                        assert computed <= len("Question 0?<>\n<>assistant\n<think>\n") + 4 < alone[2]
                    messages.append({"role": "assistant", "content": content})
                    await app._services.next_turns._task  # type: ignore[union-attr, misc]
            assert made.stats.num_background >= NUM_TURNS

    asyncio.run(main())
