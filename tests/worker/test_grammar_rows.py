"""Rows with a grammar: their tokens obey it, whatever else happens, and their neighbours do not notice."""

from __future__ import annotations

import json
import random
import re
from functools import cache
from pathlib import Path

import mlx.core as mx
import msgspec
import pytest
import tokenizers
from llguidance import LLMatcher
from tokenizers import decoders, models, pre_tokenizers

from mlxd.chat.structured import compile_error
from mlxd.step import GrammarSpec, SamplingParams
from mlxd.worker.runner import Runner
from tests.worker.driver import Driver, Sequence
from tests.worker.tiny_models import VOCAB_SIZE, tiny_model

NUM_BLOCKS = 300
BLOCK_SIZE = 4
STOP = 0
THINK = 2
SPECIAL_TOKENS = ["<stop>", "<pad>", "<think>", "</think>"]
SMALL_OBJECT = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "yz"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


def byte_tokenizer() -> tokenizers.Tokenizer:
    """Four special tokens, every byte, and some words: VOCAB_SIZE tokens in all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in "abxyz" for b in "abxyz{}:0"][: VOCAB_SIZE - len(SPECIAL_TOKENS) - len(alphabet)]
    words = [*SPECIAL_TOKENS, *alphabet, *(a + b for a, b in pairs)]
    tokenizer = tokenizers.Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


TOKENIZER = byte_tokenizer()


@cache
def model() -> object:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    path = tmp_path_factory.mktemp("model") / "tokenizer.json"
    TOKENIZER.save(str(path))
    return make_runner(path)


@pytest.fixture
def driver(runner: Runner) -> Driver:
    return Driver(runner, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)


def make_runner(tokenizer_file: Path | None) -> Runner:
    return Runner(
        model(),
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        max_num_seqs=40,
        dtype=mx.float32,
        tokenizer_file=tokenizer_file,
    )


def json_grammar(schema: object) -> str:
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), {"whitespace_flexible": False})


def constrained(grammar: str, *, seed: int = 0, **fields: object) -> SamplingParams:
    """At temperature 1, so that a model with random weights says something else each time."""
    names = set(GrammarSpec.__struct_fields__)
    spec = {key: value for key, value in fields.items() if key in names}
    others = {key: value for key, value in fields.items() if key not in names}
    return SamplingParams(
        seed=seed,
        grammar=GrammarSpec(grammar, **{"stop_token_ids": (STOP,), **spec}),  # type: ignore[arg-type]
        **others,  # type: ignore[arg-type]
    )


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(4, VOCAB_SIZE), k=length)


def text_of(sequence: Sequence) -> str:
    """What it has said up to its first stop token, which must be there."""
    end = sequence.outputs.index(STOP)
    return TOKENIZER.decode(sequence.outputs[:end], skip_special_tokens=False)


def is_small_object(text: str) -> bool:
    value = json.loads(text)
    return value.keys() == {"a", "b"} and 0 <= value["a"] <= 99 and value["b"] in ("x", "yz")


@pytest.mark.parametrize("wait", [True, False], ids=["waiting", "one step in flight"])
def test_every_output_is_one_of_the_grammars_and_then_stops(driver: Driver, wait: bool) -> None:
    grammar = json_grammar(SMALL_OBJECT)
    greedy = constrained(grammar, temperature=0.0)
    few = constrained(grammar, seed=7, top_k=5, top_p=0.9)
    sequences = [driver.add(prompt_of(5 + seed, seed), constrained(grammar, seed=seed)) for seed in range(6)]
    sequences += [driver.add(prompt_of(9), greedy), driver.add(prompt_of(9), few)]
    driver.run(60, wait=wait)
    for sequence in sequences:
        assert not sequence.errors
        assert is_small_object(text_of(sequence))
        assert set(sequence.outputs[sequence.outputs.index(STOP) :]) == {STOP}, "only a stop may follow"


def test_neighbours_get_what_they_get_without_it(driver: Driver) -> None:
    ways = [
        SamplingParams(temperature=0.0),
        SamplingParams(seed=1, logprobs=2),
        SamplingParams(seed=2, top_k=9, presence_penalty=1.0),
    ]
    alone = [driver.add(prompt_of(6, seed), way) for seed, way in enumerate(ways)]
    driver.run(20, wait=False)
    for sequence in alone:
        driver.remove(sequence)
    beside = [driver.add(prompt_of(6, seed), way) for seed, way in enumerate(ways)]
    driver.add(prompt_of(7), constrained(json_grammar(SMALL_OBJECT)))
    driver.run(20, wait=False)
    for one, other in zip(alone, beside, strict=True):
        assert one.outputs[:20] == other.outputs[:20]


def test_a_preempted_request_goes_on_where_it_was(driver: Driver) -> None:
    params = constrained(LLMatcher.grammar_from_regex("[abxyz]{30}"), seed=3)
    expected = driver.add(prompt_of(8), params)
    driver.run(40, wait=False)
    driver.remove(expected)
    preempted = driver.add(prompt_of(8), params)
    for _ in range(7):
        driver.step(wait=False)
    driver.preempt(preempted)
    driver.run(40, wait=False)
    assert preempted.outputs[:40] == expected.outputs[:40]
    assert re.fullmatch("[abxyz]{30}", text_of(preempted))


def test_a_new_worker_goes_on_where_the_old_one_was(driver: Driver, tmp_path: Path) -> None:
    """As after a restart: it knows nothing but the prompt and the tokens that are out."""
    grammar = json_grammar(SMALL_OBJECT)
    thinking = {"triggers": ("</think>",), "logit_bias": {TOKENIZER.token_to_id("</think>"): 6.0}}
    ways = [constrained(grammar, seed=4), constrained(grammar, seed=5, **thinking)]
    expected = [driver.add(prompt_of(8, seed), way) for seed, way in enumerate(ways)]
    driver.run(60, wait=False)
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    for done in range(0, 20, 3):
        other = Driver(make_runner(tmp_path / "tokenizer.json"), num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
        for sequence in expected:
            resumed = other.add(list(sequence.prompt), sequence.sampling)
            resumed.outputs += sequence.outputs[:done]
        other.run(60, wait=False)
        assert [sequence.outputs[:60] for sequence in other.sequences] == [
            sequence.outputs[:60] for sequence in expected
        ]


def test_choices_of_one_prompt_are_each_held_to_the_grammar(driver: Driver) -> None:
    """As n > 1 does: blocks are shared, numbers are not."""
    grammar = json_grammar(SMALL_OBJECT)
    first = driver.add(prompt_of(9), constrained(grammar, seed=0))
    driver.step()
    choices = [first, *(driver.fork(first, constrained(grammar, seed=seed)) for seed in range(1, 8))]
    driver.run(60, wait=False)
    texts = [text_of(choice) for choice in choices]
    assert all(map(is_small_object, texts))
    assert len(set(texts)) > 1


def test_logprobs_are_those_of_the_model_without_a_grammar(driver: Driver) -> None:
    """The first token of each has the same context, and so the same raw distribution."""
    grammar = LLMatcher.grammar_from_regex("[ab]{3}")
    free = driver.add(prompt_of(9), SamplingParams(temperature=0.0, logprobs=VOCAB_SIZE))
    held = driver.add(prompt_of(9), constrained(grammar, temperature=0.0, logprobs=3))
    driver.run(4)
    [everything, said] = free.logprobs[0], held.logprobs[0]
    assert everything is not None and said is not None
    raw = dict(zip(everything.top_token_ids, everything.top_logprobs, strict=True))
    token = held.outputs[0]
    assert TOKENIZER.decode([token]).strip("ab") == ""
    assert said.logprob == pytest.approx(raw[token], abs=1e-5)
    assert said.rank == 1 + sum(logprob > raw[token] for logprob in raw.values())
    assert said.top_token_ids == everything.top_token_ids[:3], "what the model would have said"


def test_a_grammar_that_must_end_wins_over_min_tokens(driver: Driver) -> None:
    grammar = LLMatcher.grammar_from_regex("ab?")
    sequence = driver.add(prompt_of(5), constrained(grammar, min_tokens=10, stop_token_ids=(STOP,)))
    sequence.sampling = msgspec.structs.replace(sequence.sampling, stop_token_ids=(STOP,))
    driver.run(6)
    assert text_of(sequence) == "ab", "while something else is allowed, min_tokens holds"


def test_bias_and_penalties_move_within_the_grammar(driver: Driver) -> None:
    grammar = LLMatcher.grammar_from_regex("[ab]{10}")
    a, b = (TOKENIZER.token_to_id(letter) for letter in "ab")
    singles = {TOKENIZER.token_to_id(pair): -100.0 for pair in ("aa", "ab", "ba", "bb")}
    biased = driver.add(prompt_of(5), constrained(grammar, logit_bias={a: 100.0, **singles}))
    penalised = driver.add(
        prompt_of(5), constrained(grammar, temperature=0.0, frequency_penalty=2.0, logit_bias=singles)
    )
    driver.run(12)
    assert text_of(biased) == "a" * 10
    assert {a, b} <= set(penalised.outputs[:10])


def test_free_up_to_a_trigger_and_no_end_before_it(driver: Driver) -> None:
    bias = {TOKENIZER.token_to_id("</think>"): 6.0, STOP: 50.0}
    spec = constrained(json_grammar(SMALL_OBJECT), triggers=("</think>",), logit_bias=bias, seed=5)
    sequences = [
        driver.add(prompt_of(5, seed), msgspec.structs.replace(spec, seed=seed)) for seed in range(6)
    ]
    driver.run(80, wait=False)
    thoughts = 0
    for sequence in sequences:
        thought, _, answer = text_of(sequence).partition("</think>")
        assert is_small_object(answer)
        thoughts += bool(thought)
    assert thoughts, "some have said something before"


@pytest.mark.parametrize(("bias", "thinks"), [(100.0, True), (-100.0, False)])
def test_an_output_may_open_with_thinking(driver: Driver, bias: float, thinks: bool) -> None:
    close = TOKENIZER.token_to_id("</think>")
    sequence = driver.add(
        prompt_of(5),
        constrained(
            json_grammar(SMALL_OBJECT),
            triggers=("</think>",),
            opening_token_ids=(THINK,),
            logit_bias={THINK: bias, close: 200.0},
        ),
    )
    driver.run(60)
    text = text_of(sequence)
    assert text.startswith("<think>") is thinks
    assert is_small_object(text.partition("</think>")[2] if thinks else text)


def test_a_lazy_grammar_holds_behind_each_trigger(driver: Driver) -> None:
    """A trigger is two letters here, so that a random model finds it, in one token or in two.

    A token that ends one and brings text along was free to say anything, so there is none here.
    """
    bias = {TOKENIZER.token_to_id(text): 5.0 for text in ("a", "b", "ab", "y")}
    bias |= {TOKENIZER.token_to_id("b" + other): -100.0 for other in "abxyz{}:0"}
    bias |= {TOKENIZER.token_to_id("y" + other): -100.0 for other in "abxyz{}:0"}
    params = constrained(
        LLMatcher.grammar_from_lark('start: "ab" /[0-9]{3};/ | "ay" /[A-Z]{3};/'),
        triggers=("ab", "ay"),
        repeats=True,
        logit_bias=bias,
    )
    sequences = [
        driver.add(prompt_of(5, seed), msgspec.structs.replace(params, seed=seed)) for seed in range(6)
    ]
    driver.run(60, wait=False)
    num_calls = {"b": 0, "y": 0}
    for sequence in sequences:
        text = TOKENIZER.decode(sequence.outputs[:60], skip_special_tokens=False)
        for trigger, call in re.findall(r"a([by])\s{0,4}(.{0,4})", text, re.DOTALL):
            num_calls[trigger] += 1
            letters = "[0-9]" if trigger == "b" else "[A-Z]"
            assert re.match(rf"{letters}{{0,3}}$|{letters}{{3}};", call), text
    assert min(num_calls.values()) > 3


def test_a_grammar_that_cannot_work_fails_its_own_row(driver: Driver) -> None:
    bad = driver.add(prompt_of(5), constrained(LLMatcher.grammar_from_lark("start: NOTHING")))
    good = driver.add(prompt_of(5), SamplingParams(temperature=0.0))
    driver.run(3)
    assert "grammar" in bad.errors[0] and "NOTHING" in bad.errors[0]
    assert set(bad.outputs) == {-1}
    assert not good.errors


def test_a_grammar_that_cannot_go_on_fails_its_row_from_there(driver: Driver) -> None:
    """Too large behind a choice, where nobody has looked when the request was taken."""
    big = {"type": "object", "properties": {f"key{i}": {"type": "integer"} for i in range(510)}}
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "yz"]}, "b": big},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
    assert compile_error(grammar) is None
    bad = driver.add(prompt_of(5), constrained(grammar))
    driver.run(30)
    num_valid = bad.outputs.index(-1)
    assert num_valid > 5 and set(bad.outputs[num_valid:]) == {-1}
    assert len(bad.errors) == 30 - num_valid
    assert all("the grammar of this request cannot go on" in error for error in bad.errors)


def test_a_grammar_that_leaves_no_choice_for_long_fails_its_row(driver: Driver) -> None:
    """Where that begins behind a choice nobody has looked, and everybody in the step waits for it."""
    grammar = LLMatcher.grammar_from_lark('start: ("y" | "z") "abcdefgh"{%d}')
    long = driver.add(prompt_of(5), constrained(grammar.replace("%d", "2049")))
    short = driver.add(prompt_of(5), constrained(grammar.replace("%d", "2048")))
    driver.run(4)
    assert long.outputs[0] >= 0 and long.outputs[1:] == [-1] * 3
    assert "leaves no choice for more than 16384 bytes" in long.errors[0]
    assert not short.errors and min(short.outputs) >= 0


def test_without_a_tokenizer_the_request_fails_and_says_why() -> None:
    driver = Driver(make_runner(None), num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    sequence = driver.add(prompt_of(5), constrained(LLMatcher.grammar_from_regex("a")))
    driver.run(1)
    assert "tokenizer.json" in sequence.errors[0]
