"""What stands before a completion's own text: the prompt repeated, and what the model thinks of it.

It does not know frames, sequences or whole answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlxd.api.openai.logprobs import CompletionLogprobs, vllm_prompt_logprobs
from mlxd.engine.prompt_logprobs import PromptLogprobs
from mlxd.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Opening:
    """Of one choice. `echo` is None where the prompt is not repeated; `logprobs`, of the prompt and then of
    what is generated, where these were not asked for; `num_prompt_logprobs` likewise."""

    prompt_token_ids: Sequence[int]
    tokenizer: Tokenizer
    echo: str | None
    logprobs: CompletionLogprobs | None
    num_prompt_logprobs: int | None

    @property
    def text(self) -> str:
        return self.echo or ""

    def make(self, known: PromptLogprobs | None) -> dict[str, Any]:
        """A choice's `text` and `logprobs`, and its `prompt_logprobs` if asked for. Once a choice."""
        logprobs = None
        if self.logprobs is not None and self.echo is not None and known is not None:
            logprobs = self.logprobs.echo(self.echo, self.prompt_token_ids, known)
        fields: dict[str, Any] = {"text": self.text, "logprobs": logprobs}
        if self.num_prompt_logprobs is not None and known is not None:
            fields["prompt_logprobs"] = vllm_prompt_logprobs(
                self.prompt_token_ids, known, self.num_prompt_logprobs, self.tokenizer
            )
        return fields
