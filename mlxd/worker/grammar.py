"""Grammars of the requests in slots: what each has said so far, and which tokens it may say next.

It does not know MLX, the model or how tokens are drawn. llguidance does the parsing
(https://github.com/guidance-ai/llguidance); its own MLX module needs Metal, so masks leave here as bits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from mlxd.step import MAX_FORCED_BYTES, GrammarSpec, SlotInit

NUM_COMPILED = 64
"""Compiled grammars that are kept; a copy for a request takes a few microseconds."""

MAX_LEADING_SPACES = 2
"""Tokens of white space that a model may put between a trigger and what the grammar wants."""

Bitmask = npt.NDArray[np.uint8]
"""One bit a token, lowest first: set where the token may come. Whole bytes that cover the vocabulary."""


class Step(Protocol):
    """A step that has been launched."""

    def tokens(self) -> npt.NDArray[np.int32]:
        """What it sampled, -1 where a row failed. Waits for it."""


@dataclass(frozen=True, slots=True)
class RowConstraint:
    """What holds for a row's next token. `must_stop`: `bitmask` allows stop tokens and nothing else."""

    bitmask: Bitmask | None = None
    must_stop: bool = False
    error: str | None = None


FREE = RowConstraint()


class Grammars:
    """The grammars of a runner's slots."""

    def __init__(self, tokenizer_file: Path | None, vocab_size: int) -> None:
        """`tokenizer_file` is the model's tokenizer.json; without one, requests with a grammar fail."""
        self._tokenizer_file = tokenizer_file
        self._vocab_size = vocab_size
        self._vocabulary: Vocabulary | None = None
        self._rows: dict[int, GrammarRow] = {}
        self._compiled: OrderedDict[str, Future[LLMatcher]] = OrderedDict()
        self._compiler: ThreadPoolExecutor | None = None

    def load(self) -> None:
        """Read the vocabulary now: some 0.5 s, during which the interpreter does nothing else.

        Raises ValueError where llguidance does not understand it, or there is none.
        """
        if self._tokenizer_file is None:
            raise ValueError("the model has no tokenizer.json, which grammars need")
        self._vocabulary = Vocabulary(self._tokenizer_file, self._vocab_size)

    def admit(self, init: SlotInit) -> None:
        """A request takes a slot: its grammar, if any, goes on behind the tokens that are already out."""
        self.release(init.slot)
        spec = init.sampling.grammar
        if spec is None:
            return
        output = np.frombuffer(init.token_ids, dtype="<i4")[init.num_prompt_tokens :]
        try:
            if self._vocabulary is None:
                self.load()
        except ValueError as error:
            self._rows[init.slot] = FailedRow(str(error))
            return
        assert self._vocabulary is not None
        self._rows[init.slot] = ConstrainedRow(
            spec, self._vocabulary, self._compile(self._vocabulary, spec.grammar), output.tolist()
        )

    def release(self, slot: int) -> None:
        self._rows.pop(slot, None)

    def constrained(self, slots: npt.NDArray[np.int32]) -> dict[int, GrammarRow]:
        """The rows among these slots that have a grammar, by their place; empty for most steps."""
        if not self._rows:
            return {}
        return {place: self._rows[slot] for place, slot in enumerate(slots.tolist()) if slot in self._rows}

    def _compile(self, vocabulary: Vocabulary, grammar: str) -> Future[LLMatcher]:
        """In a thread of its own, because a large grammar takes as long as many steps."""
        known = self._compiled.get(grammar)
        if known is not None:
            self._compiled.move_to_end(grammar)
            return known
        if self._compiler is None:
            self._compiler = ThreadPoolExecutor(1, "grammar")
        self._compiled[grammar] = future = self._compiler.submit(vocabulary.matcher, grammar)
        if len(self._compiled) > NUM_COMPILED:
            self._compiled.popitem(last=False)
        return future


class Vocabulary:
    """The model's tokens as llguidance needs them. Immutable; any number of matchers share it."""

    def __init__(self, tokenizer_file: Path, vocab_size: int) -> None:
        """ValueError where the file is not understood."""
        self._tokenizer = LLTokenizer(str(tokenizer_file), n_vocab=vocab_size)
        self.num_bytes = (vocab_size + 7) // 8
        # Which of the tokens llguidance takes for the end; which ones end a request is not for it to say.
        self.eos_token_ids: tuple[int, ...] = tuple(self._tokenizer.eos_tokens)
        spellings = [self.tokens_of(text) for text in (b"\n", b"\n\n", b" ")]
        self.space_token_ids = tuple(tokens[0] for tokens in spellings if len(tokens) == 1)

    def matcher(self, grammar: str) -> LLMatcher:
        """A matcher at its beginning; what is wrong with the grammar is its error."""
        limits = LLParserLimits(verbose_errors=False)
        return LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)

    def bytes_of(self, token: int) -> bytes:
        text: bytes = self._tokenizer.decode_bytes([token])
        return text

    def tokens_of(self, text: bytes) -> list[int]:
        """Some tokens that spell `text`."""
        tokens: list[int] = self._tokenizer.tokenize_bytes(text)
        return tokens


class GrammarRow(Protocol):
    """The grammar of one request, while it has a slot."""

    def sampled(self, step: Step, place: int) -> None:
        """Its next token is the one at `place` of those that `step` samples."""

    def constraint(self) -> RowConstraint:
        """What holds for the token after that one, for which it waits."""


class FailedRow:
    """A request whose grammar cannot work."""

    def __init__(self, error: str) -> None:
        self._constraint = RowConstraint(error=error)

    def sampled(self, step: Step, place: int) -> None:
        """Nothing follows from it."""

    def constraint(self) -> RowConstraint:
        return self._constraint


class ConstrainedRow:
    """Follows one output through its grammar: `_matcher` is None where the output is free."""

    def __init__(
        self,
        spec: GrammarSpec,
        vocabulary: Vocabulary,
        compiled: Future[LLMatcher],
        output_token_ids: Sequence[int],
    ) -> None:
        self._spec = spec
        self._vocabulary = vocabulary
        self._compiled = compiled
        self._triggers = tuple(trigger.encode() for trigger in spec.triggers)
        self._stops = frozenset(spec.stop_token_ids)
        self._known: Sequence[int] = output_token_ids
        """tokens that are out, and still to be followed"""
        self._source: tuple[Step, int] | None = None
        self._matcher: LLMatcher | None = None
        self._tail = b""
        """the end of free output: no trigger, perhaps the beginning of one"""
        self._has_begun = False
        self._num_spaces_left = 0
        """above 0 behind a trigger, until the grammar's own text begins"""
        self._error: str | None = None

    def sampled(self, step: Step, place: int) -> None:
        self._catch_up()
        self._source = (step, place)

    def constraint(self) -> RowConstraint:
        if not self._has_begun and not self._triggers_first:
            self._enter_grammar()
        self._catch_up()
        if self._error is not None:
            return RowConstraint(error=self._error)
        if self._matcher is not None:
            return self._grammar_constraint(self._matcher)
        if self._spec.repeats:
            return FREE
        # The grammar is still to come, so this is no place to end.
        bitmask = np.full(self._vocabulary.num_bytes, 255, dtype=np.uint8)
        _clear(bitmask, self._stops)
        return RowConstraint(bitmask)

    @property
    def _triggers_first(self) -> bool:
        """Whether the output is free at its beginning."""
        return bool(self._triggers) and not self._spec.opening_token_ids

    def _grammar_constraint(self, matcher: LLMatcher) -> RowConstraint:
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        bitmask = bits[: self._vocabulary.num_bytes].copy()
        if matcher.is_error():
            self._fail(matcher)
        elif len(matcher.compute_ff_bytes()) > MAX_FORCED_BYTES:
            self._error = (
                f"the grammar of this request leaves no choice for more than {MAX_FORCED_BYTES} bytes"
            )
        if self._error is not None:
            return RowConstraint(error=self._error)
        _clear(bitmask, self._vocabulary.eos_token_ids)
        _clear(bitmask, self._stops)
        if not self._has_begun:
            _set(bitmask, self._spec.opening_token_ids)
        if self._num_spaces_left:
            _set(bitmask, self._vocabulary.space_token_ids)
        must_stop = not bitmask.any()
        if matcher.is_accepting():
            _set(bitmask, self._stops)
        return RowConstraint(bitmask, must_stop)

    def _catch_up(self) -> None:
        """Follow the tokens that are out, in their order; the last one may still be on its way."""
        known, self._known = self._known, ()
        for token in known:
            self._accept(token)
        if self._source is not None:
            step, place = self._source
            self._source = None
            self._accept(int(step.tokens()[place]))

    def _accept(self, token: int) -> None:
        if self._error is not None or token < 0 or token in self._stops:
            return
        if not self._has_begun:
            self._has_begun = True
            if token in self._spec.opening_token_ids:
                self._matcher = None
            elif not self._triggers_first:
                self._enter_grammar()
        if self._matcher is None:
            self._accept_free(self._vocabulary.bytes_of(token))
        elif not self._skips_space(self._matcher, token):
            self._consume(self._matcher, [token])

    def _consume(self, matcher: LLMatcher, tokens: list[int]) -> None:
        if not matcher.consume_tokens(tokens):
            self._fail(matcher)
        elif self._spec.repeats and matcher.is_stopped():
            self._matcher = None

    def _skips_space(self, matcher: LLMatcher, token: int) -> bool:
        """Whether this token is white space between a trigger and the grammar."""
        if not self._num_spaces_left:
            return False
        if matcher.validate_tokens([token]) == 0 and self._vocabulary.bytes_of(token).isspace():
            self._num_spaces_left -= 1
            return True
        self._num_spaces_left = 0
        return False

    def _accept_free(self, text: bytes) -> None:
        """Looks for a trigger; what follows the first one is the grammar's."""
        tail = self._tail + text
        found = [(start + len(t), t) for t in self._triggers if (start := tail.find(t)) >= 0]
        if not found:
            self._tail = tail[1 - max(map(len, self._triggers)) :]
            return
        self._tail = b""
        self._enter_grammar()
        matcher = self._matcher
        if matcher is None:
            return
        end, trigger = min(found)
        rest = self._vocabulary.tokens_of(tail[end:].lstrip())
        if not rest:
            self._num_spaces_left = MAX_LEADING_SPACES
        tokens = self._vocabulary.tokens_of(trigger) + rest if self._spec.repeats else rest
        if self._spec.repeats and matcher.validate_tokens(tokens) < len(tokens):
            self._matcher = None  # it was not held to the grammar yet, and says something else
        elif tokens:
            self._consume(matcher, tokens)

    def _enter_grammar(self) -> None:
        if self._matcher is not None:
            return
        compiled = self._compiled.result()
        if compiled.is_error():
            self._fail(compiled)
        else:
            self._matcher = compiled.deep_copy()

    def _fail(self, matcher: LLMatcher) -> None:
        reason = matcher.get_error().partition("\n")[0][:200]
        self._error = f"the grammar of this request cannot go on: {reason}"


def _clear(bitmask: Bitmask, token_ids: Sequence[int] | frozenset[int]) -> None:
    for token in token_ids:
        bitmask[token >> 3] &= ~np.uint8(1 << (token & 7))


def _set(bitmask: Bitmask, token_ids: Sequence[int] | frozenset[int]) -> None:
    for token in token_ids:
        bitmask[token >> 3] |= np.uint8(1 << (token & 7))
