"""From logits to tokens: the sampling parameters of all rows of a step, as one program.

It does not know the model or the KV cache.

The order is vLLM's: logit_bias and min_tokens, penalties, grammar, temperature, min_p, top_k, top_p, draw.
Rows go by what they need: greedy rows take the argmax; rows with a small top_k work on a prefix of the best
tokens; the others on the whole vocabulary. A row's path follows from its own parameters, and its randomness
from its own seed and position, so no neighbour changes its token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlxd.step import SamplingParams, SlotInit
from mlxd.worker import sampling
from mlxd.worker.exponential import exp_nonpositive
from mlxd.worker.grammar import FREE, RowConstraint
from mlxd.worker.history import NEUTRAL_LANE, TokenHistory
from mlxd.worker.logprobs import SampledLogprobs
from mlxd.worker.randomness import uniforms

GREEDY_TEMPERATURE = 1e-5
"""Below this a temperature is 0, as in vLLM."""

PREFIXES = {64: 256, 256: 1024}
"""Up to this top_k, this many best tokens are looked at. The surplus holds ties with the last one kept."""


@dataclass(slots=True)
class SlotState:
    """What the sampler keeps of the request in a slot."""

    params: SamplingParams
    num_prompt_tokens: int
    lane: int = NEUTRAL_LANE
    error: str | None = None

    @property
    def plain(self) -> bool:
        """Whether its tokens are always the model's first choice, and nothing else is asked for."""
        params = self.params
        return (
            params.temperature < GREEDY_TEMPERATURE
            and self.lane == NEUTRAL_LANE
            and self.error is None
            and not params.logit_bias
            and not (params.min_tokens and params.stop_token_ids)
            and params.logprobs < 0
        )


@dataclass(slots=True)
class Sampled:
    """A step's tokens on their way: int32 [S], -1 where the logits were not numbers."""

    tokens: mx.array
    logprobs: SampledLogprobs | None
    errors: list[tuple[int, str]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Row:
    """One sampled row: its place among them, its slot's state and where it stands."""

    index: int
    state: SlotState
    context_len: int
    constraint: RowConstraint = FREE

    @property
    def params(self) -> SamplingParams:
        return self.state.params

    @property
    def num_output_tokens(self) -> int:
        return self.context_len - self.state.num_prompt_tokens


NO_CONSTRAINTS: Mapping[int, RowConstraint] = {}


class Sampler:
    """Samples a step's rows. `last_tokens`, int32 [max_num_seqs + 1]: each slot's last one, and a spare."""

    def __init__(self, vocab_size: int, max_num_seqs: int) -> None:
        self.vocab_size = vocab_size
        self.last_tokens = mx.zeros((max_num_seqs + 1,), dtype=mx.int32)
        self._slots: dict[int, SlotState] = {}
        self._plain = np.zeros(max_num_seqs + 1, dtype=np.bool_)
        self._history = TokenHistory(vocab_size)
        # What each value of a byte of a bitmask adds to eight logits.
        bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
        self._byte_biases = mx.array(np.where(bits, 0, -np.inf).astype(np.float32))

    def admit(self, init: SlotInit) -> None:
        """A request takes a slot. What is wrong with its parameters becomes an error of its own rows."""
        self.release(init.slot)
        state = SlotState(init.sampling, init.num_prompt_tokens)
        outside = [
            token
            for token in (*init.sampling.logit_bias, *init.sampling.stop_token_ids)
            if not 0 <= token < self.vocab_size
        ]
        if outside:
            state.error = f"token id {outside[0]} is outside the vocabulary of {self.vocab_size} tokens"
        elif init.sampling.needs_token_history:
            tokens = np.frombuffer(init.token_ids, dtype="<i4")
            prompt, output = np.split(tokens, [init.num_prompt_tokens])
            state.lane = self._history.add(init.sampling, prompt, output)
        self._slots[init.slot] = state
        self._plain[init.slot] = state.plain

    def release(self, slot: int) -> None:
        state = self._slots.pop(slot, None)
        if state is not None and state.lane != NEUTRAL_LANE:
            self._history.remove(state.lane)

    def sample(
        self,
        logits: mx.array,
        slots: npt.NDArray[np.int32],
        context_lens: npt.NDArray[np.int32],
        constraints: Mapping[int, RowConstraint] = NO_CONSTRAINTS,
    ) -> Sampled:
        """Sample one token a row and remember it. logits [S, vocab_size]; nothing is waited for.

        `constraints` are those of the rows that have any, by their place.
        """
        if not constraints and self._plain[slots].all():
            # Most steps of most servers; looking at each of 128 rows takes longer than the rest of a launch.
            tokens, failed = self._remember(
                mx.argmax(logits, axis=-1).astype(mx.int32), logits.astype(mx.float32), slots
            )
            return Sampled(mx.where(failed, -1, tokens), None)
        logits = logits.astype(mx.float32)
        rows = [
            _Row(index, self._slots[int(slot)], int(context_len), constraints.get(index, FREE))
            for index, (slot, context_len) in enumerate(zip(slots, context_lens, strict=True))
        ]
        tokens, failed = self._remember(self._sample_groups(logits, rows), logits, slots)
        counting = [row for row in rows if row.state.lane != NEUTRAL_LANE]
        if counting:
            self._history.append([row.state.lane for row in counting], _take(tokens, counting, len(rows)))
        asking = [row for row in rows if row.params.logprobs >= 0]
        logprobs = None
        if asking:
            logprobs = SampledLogprobs(
                _take(logits, asking, len(rows)),
                _take(tokens, asking, len(rows)),
                [(row.index, row.params.logprobs) for row in asking],
            )
        problems = [(row.index, row.state.error or row.constraint.error) for row in rows]
        errors = [(index, problem) for index, problem in problems if problem is not None]
        return Sampled(mx.where(failed, -1, tokens), logprobs, errors)

    def _remember(
        self, tokens: mx.array, logits: mx.array, slots: npt.NDArray[np.int32]
    ) -> tuple[mx.array, mx.array]:
        """The tokens that steps to come go on with, and which rows have none for want of numbers.

        logits: float32 [S, vocab_size]
        """
        # A sum is NaN or infinite exactly when some logit is; minus infinity alone is a legitimate mask.
        checksum = logits.sum(axis=-1)
        failed = mx.isnan(checksum) | (checksum == mx.inf)
        tokens = mx.where(failed, 0, tokens)
        # Written to a new object: a step in flight waits for the one that it holds, and an assignment to that
        # one would make it wait for this step too.
        last_tokens = self.last_tokens[:]
        last_tokens[mx.array(slots)] = tokens
        self.last_tokens = last_tokens
        return tokens, failed

    def _sample_groups(self, logits: mx.array, rows: Sequence[_Row]) -> mx.array:
        groups: dict[int, list[_Row]] = {}
        for row in rows:
            groups.setdefault(_path(row.params, self.vocab_size), []).append(row)
        parts = []
        for path, members in groups.items():
            adjusted = self._adjust(_take(logits, members, len(rows)), members)
            if path == _GREEDY:
                parts.append(mx.argmax(adjusted, axis=-1).astype(mx.int32))
            elif path == _FULL:
                parts.append(_sample_full(adjusted, members))
            else:
                parts.append(_sample_prefix(adjusted, members, path))
        if len(parts) == 1:
            return parts[0]
        order = [row.index for members in groups.values() for row in members]
        return mx.concatenate(parts)[mx.array(np.argsort(order), dtype=mx.int32)]

    def _adjust(self, logits: mx.array, rows: Sequence[_Row]) -> mx.array:
        """Bias, bans, penalties and grammar. Rows without any come out as they went in, to the bit."""
        edits: list[tuple[int, int, float]] = []
        for place, row in enumerate(rows):
            if row.state.error is not None:
                continue
            edits += [(place, token, bias) for token, bias in row.params.logit_bias.items()]
            if row.num_output_tokens < row.params.min_tokens and not row.constraint.must_stop:
                edits += [(place, token, -np.inf) for token in row.params.stop_token_ids]
        if edits:
            places, ids, amounts = zip(*edits, strict=True)
            index = (mx.array(places, dtype=mx.int32), mx.array(ids, dtype=mx.int32))
            logits = logits.at[index].add(mx.array(amounts, dtype=mx.float32))
        if any(row.state.lane != NEUTRAL_LANE for row in rows):
            logits = self._history.penalise(logits, [row.state.lane for row in rows])
        return self._constrain(logits, rows)

    def _constrain(self, logits: mx.array, rows: Sequence[_Row]) -> mx.array:
        """Minus infinity for what a row's grammar does not allow."""
        bitmasks = {
            place: row.constraint.bitmask
            for place, row in enumerate(rows)
            if row.constraint.bitmask is not None
        }
        if not bitmasks:
            return logits
        packed = mx.array(np.stack(list(bitmasks.values())))
        biases = self._byte_biases[packed].reshape(len(bitmasks), -1)[:, : self.vocab_size]
        if len(bitmasks) == len(rows):
            return logits + biases
        return logits.at[mx.array(list(bitmasks), dtype=mx.int32)].add(biases)


_GREEDY = -1
_FULL = 0


def _path(params: SamplingParams, vocab_size: int) -> int:
    """How a row is sampled: greedily, over the full vocabulary, or over this many best tokens."""
    if params.temperature < GREEDY_TEMPERATURE:
        return _GREEDY
    for top_k, size in PREFIXES.items():
        if 0 < params.top_k <= top_k and size < vocab_size:
            return size
    return _FULL


def _sample_prefix(logits: mx.array, rows: Sequence[_Row], size: int) -> mx.array:
    """Rows whose top_k leaves at most a few of the `size` best tokens."""
    best = mx.sort(mx.argpartition(logits, -size, axis=-1)[:, -size:], axis=-1)
    z = _scaled(mx.take_along_axis(logits, best, axis=-1), rows)
    probabilities = sampling.keep_min_p(z, _column(rows, lambda params: params.min_p))
    threshold = sampling.sorted_thresholds(
        probabilities,
        mx.array([[row.params.top_k] for row in rows], dtype=mx.int32),
        _column(rows, lambda params: params.top_p),
    )
    place = sampling.draw(probabilities * (probabilities >= threshold), _uniform(rows))
    return mx.take_along_axis(best, place[:, None], axis=-1).squeeze(-1).astype(mx.int32)


def _sample_full(logits: mx.array, rows: Sequence[_Row]) -> mx.array:
    """Rows of which any token may come. Only what some row of the group asks for is computed."""
    vocab_size = logits.shape[-1]
    z = _scaled(logits, rows)
    if any(row.params.min_p > 0 for row in rows):
        probabilities = sampling.keep_min_p(z, _column(rows, lambda params: params.min_p))
    else:
        probabilities = exp_nonpositive(z)
    if any(0 < row.params.top_k < vocab_size for row in rows):
        top_k = [[min(row.params.top_k or vocab_size, vocab_size)] for row in rows]
        off = mx.ones((len(rows), 1))
        threshold = sampling.sorted_thresholds(probabilities, mx.array(top_k, dtype=mx.int32), off)
        probabilities = probabilities * (probabilities >= threshold)
    if any(row.params.top_p < 1 for row in rows):
        top_p = _column(rows, lambda params: params.top_p)
        probabilities = probabilities * (z >= sampling.nucleus_thresholds(z, probabilities, top_p))
    return sampling.draw(probabilities, _uniform(rows))


def _scaled(logits: mx.array, rows: Sequence[_Row]) -> mx.array:
    """Logits over temperature, minus the row's largest."""
    z = logits - mx.max(logits, axis=-1, keepdims=True)
    if all(row.params.temperature == 1 for row in rows):
        return z
    return z / _column(rows, lambda params: params.temperature)


def _uniform(rows: Sequence[_Row]) -> mx.array:
    positions = np.array([row.context_len for row in rows], dtype=np.int32)
    return mx.array(uniforms((row.params.seed for row in rows), positions))[:, None]


def _column(rows: Sequence[_Row], value: Callable[[SamplingParams], float]) -> mx.array:
    return mx.array([[value(row.params)] for row in rows], dtype=mx.float32)


def _take(array: mx.array, rows: Sequence[_Row], num_rows: int) -> mx.array:
    """The given rows of an array of `num_rows`; all of them cost nothing."""
    if len(rows) == num_rows:
        return array
    return array[mx.array([row.index for row in rows], dtype=mx.int32)]
