"""OpenAI's `usage`: what a request read and wrote.

It does not know frames or answers.
"""

from __future__ import annotations

from typing import Any

from mlxd.engine.request import RequestOutput


class Usage:
    """Adds up finished sequences. Of the sequences that share a prompt, the first one counts it."""

    __slots__ = ("_num_sampled", "cached_tokens", "completion_tokens", "prompt_tokens", "reasoning_tokens")

    def __init__(self, num_sampled: int) -> None:
        self._num_sampled = num_sampled
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.cached_tokens = 0
        self.reasoning_tokens = 0

    def add(self, output: RequestOutput) -> None:
        """`output`: the last one of a sequence, with its totals."""
        self.completion_tokens += output.num_output_tokens
        self.reasoning_tokens += output.num_reasoning_tokens
        if output.index % self._num_sampled == 0:
            self.prompt_tokens += output.num_prompt_tokens
            self.cached_tokens += output.num_cached_tokens

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        }
