"""What is asked: prompts, lengths, arrivals. Every request is a function of (seed, index) alone.

It does not know the model's tokenizer: a prompt is made of common English words, `Calibration` says how
many tokens those come to (measured by two requests), and the truth is read from `usage` afterwards.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec
import orjson

_WORDS = """
the of and to in is that it was for on are with as his they be at one have this from or had by word but
what some we can out other were all there when up use your how said an each she which do their time if
will way about many then them write would like so these her long make thing see him two has look more day
could go come did number sound no most people my over know water than call first who may down side been
now find any new work part take get place made live where after back little only round man year came show
every good me give our under name very through just form sentence great think say help low line differ
turn cause much mean before move right boy old too same tell does set three want air well
"""
WORDS = tuple(_WORDS.split())

MISTAKES: tuple[dict[str, object], ...] = (
    {"temperature": "hot"},
    {"temperature": 99},
    {"top_p": -1},
    {"max_tokens": -5},
    {"n": 0},
    {"stop": [""]},
    {"logit_bias": {"word": 1}},
    {"logit_bias": []},
    {"stream": "yes"},
    {"model": "no/such-model"},
    {"messages": 7, "prompt": {}},
    {"seed": 0.5},
)
"""Fields that make a request wrong whatever else it says."""

Kind = Literal["fixed", "uniform", "lognormal"]


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of lengths in tokens, never below 1.

    fixed: `low`. uniform: `low` … `high`, both included. lognormal: median `low`, `sigma` of the logarithm,
    cut at `high`.
    """

    kind: Kind
    low: int
    high: int = 0
    sigma: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Read `128`, `fixed:128`, `uniform:64:256` or `lognormal:MEDIAN:SIGMA[:MAX]`."""
        kind, _, rest = text.partition(":") if ":" in text else ("fixed", "", text)
        values = rest.split(":")
        try:
            match kind, values:
                case "fixed", [low]:
                    lengths = cls("fixed", int(low))
                case "uniform", [low, high]:
                    lengths = cls("uniform", int(low), int(high))
                case "lognormal", [median, sigma]:
                    lengths = cls("lognormal", int(median), 100 * int(median), float(sigma))
                case "lognormal", [median, sigma, high]:
                    lengths = cls("lognormal", int(median), int(high), float(sigma))
                case _:
                    raise ValueError("unknown form")
            if lengths.low < 1 or (kind != "fixed" and lengths.high < lengths.low) or lengths.sigma < 0:
                raise ValueError("out of range")
        except ValueError as error:
            raise ValueError(
                f"{text!r} is not a length ({error}): "
                "N, fixed:N, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA[:MAX]"
            ) from None
        return lengths

    def draw(self, rng: random.Random) -> int:
        if self.kind == "fixed":
            return self.low
        if self.kind == "uniform":
            return rng.randint(self.low, self.high)
        return max(1, min(self.high, round(rng.lognormvariate(math.log(self.low), self.sigma))))


@dataclass(frozen=True, slots=True)
class Calibration:
    """tokens of a prompt = overhead_tokens + tokens_per_word * words."""

    tokens_per_word: float = 1.0
    overhead_tokens: float = 0.0

    @classmethod
    def fit(cls, first: tuple[int, int], second: tuple[int, int]) -> Calibration:
        """From two points (words, prompt_tokens)."""
        slope = (second[1] - first[1]) / (second[0] - first[0])
        if slope <= 0:
            raise ValueError(f"prompt tokens do not grow with words: {first}, {second}")
        return cls(slope, first[1] - slope * first[0])

    def words(self, tokens: int) -> int:
        """How many words make a prompt of about `tokens` tokens; at least one."""
        return max(1, round((tokens - self.overhead_tokens) / self.tokens_per_word))


class DatasetRow(msgspec.Struct, forbid_unknown_fields=True):
    """A line of a JSONL data set: `messages` (chat) or `prompt` (either API), and what else to send."""

    messages: list[dict[str, object]] | None = None
    prompt: str | list[int] | None = None
    max_tokens: int | None = None
    body: dict[str, object] = {}


def read_dataset(path: Path) -> list[DatasetRow]:
    """All rows of a JSONL file. Raises ValueError with the line's number."""
    decoder = msgspec.json.Decoder(DatasetRow)
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = decoder.decode(line)
        except msgspec.DecodeError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        if (row.messages is None) == (row.prompt is None):
            raise ValueError(f"{path}:{number}: one of `messages` and `prompt` is needed")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no requests")
    return rows


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """A request ready to send. `cut_after`: leave after so many chunks with text; None: stay.

    `invalid`: the server has to refuse it.
    """

    index: int
    body: bytes
    cut_after: int | None
    invalid: bool = False


@dataclass(frozen=True, slots=True)
class Workload:
    """How to make request number i."""

    seed: int
    model: str = "default"
    api: Literal["chat", "completions"] = "chat"
    stream: bool = True
    prompt_tokens: Lengths = Lengths("fixed", 128)
    output_tokens: Lengths = Lengths("fixed", 128)
    shared_prefix: float = 0.0
    """share of each prompt's words that is the same in all"""
    abort_fraction: float = 0.0
    invalid_fraction: float = 0.0
    """share of requests that no server may take, each wrong in one of many ways"""
    temperature: float = 0.0
    body: dict[str, object] = field(default_factory=dict)
    """more fields for every request, over the ones made here"""
    dataset: Sequence[DatasetRow] = ()
    calibration: Calibration = Calibration()

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.api == "chat" else "/v1/completions"

    def request(self, index: int) -> RequestSpec:
        """Request `index` of this workload, the same on every call."""
        # A string seed is hashed with SHA-512: neighbours in index share nothing.
        rng = random.Random(f"{self.seed}/{index}")
        max_tokens = self.output_tokens.draw(rng)
        more: dict[str, object] = {}
        prompt: object
        if self.dataset:
            row = self.dataset[index % len(self.dataset)]
            prompt = row.messages if row.messages is not None else row.prompt
            max_tokens = row.max_tokens or max_tokens
            more = row.body
        else:
            prompt = self.text(self.calibration.words(self.prompt_tokens.draw(rng)), rng)
        cut_after = rng.randrange(max_tokens) if rng.random() < self.abort_fraction else None
        if rng.random() < self.invalid_fraction:
            body = self.encode(prompt, max_tokens, {**more, **rng.choice(MISTAKES)})
            # One in so many is no JSON at all.
            body = body[:-1] if rng.randrange(len(MISTAKES)) == 0 else body
            return RequestSpec(index, body, None, invalid=True)
        return RequestSpec(index, self.encode(prompt, max_tokens, more), cut_after)

    def text(self, num_words: int, rng: random.Random) -> str:
        """`num_words` words, the first share of them those of every prompt of this seed."""
        num_shared = round(num_words * self.shared_prefix)
        shared = random.Random(f"{self.seed}/shared").choices(WORDS, k=num_shared)
        return " ".join(shared + rng.choices(WORDS, k=num_words - num_shared))

    def encode(self, prompt: object, max_tokens: int, more: dict[str, object] | None = None) -> bytes:
        """The JSON body: greedy unless told, exactly `max_tokens` long unless the server cannot."""
        fields: dict[str, object] = {"model": self.model, "max_tokens": max_tokens, "ignore_eos": True}
        if self.api == "completions":
            fields["prompt"] = prompt
        else:
            fields["messages"] = (
                prompt if not isinstance(prompt, str) else [{"role": "user", "content": prompt}]
            )
        fields["temperature"] = self.temperature
        if self.stream:
            fields |= {"stream": True, "stream_options": {"include_usage": True}}
        fields |= self.body | (more or {})
        return orjson.dumps({name: value for name, value in fields.items() if value is not None})


def arrivals(rate: float, process: Literal["poisson", "fixed"], seed: int) -> Iterator[float]:
    """Seconds after the start at which requests are due, `rate` a second, without end."""
    if process == "fixed":
        yield from (number / rate for number in itertools.count())
    rng = random.Random(f"{seed}/arrivals")
    due = 0.0
    while True:
        yield due
        due += rng.expovariate(rate)
