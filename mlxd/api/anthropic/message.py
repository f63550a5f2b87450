"""The message that answers: what is known before its first token, and what is known at its end.

It does not know content blocks, frames or how prompts are made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlxd.engine.request import FinishReason, RequestOutput


@dataclass(frozen=True, slots=True)
class MessageHead:
    """What stays the same. `marks_cache_points`: the client has set a `cache_control` somewhere."""

    id: str
    request_id: str
    model: str
    num_prompt_tokens: int
    marks_cache_points: bool

    def opening(self) -> dict[str, Any]:
        """The message without content."""
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self.usage(0, 0),
        }

    def closing(self, last: RequestOutput, *, has_calls: bool) -> dict[str, Any]:
        """`stop_reason`, `stop_sequence` and `usage`, from the sequence's last output."""
        sequence = last.stop_reason if isinstance(last.stop_reason, str) else None
        if last.finish_reason is FinishReason.LENGTH:
            reason = "max_tokens"
        elif sequence is not None:
            reason = "stop_sequence"
        else:
            reason = "tool_use" if has_calls else "end_turn"
        usage = self.usage(last.num_output_tokens, last.num_cached_tokens)
        return {"stop_reason": reason, "stop_sequence": sequence, "usage": usage}

    def usage(self, num_output_tokens: int, num_cached_tokens: int) -> dict[str, int]:
        """What was read and written. Nothing is charged for writing to the cache, so none counts as created.

        A client that marks cache points adds input_tokens and the two cache counts up to the whole prompt,
        so for it cached tokens are no input tokens. For any other, input_tokens is the whole prompt, as
        count_tokens says, and cache_read_input_tokens the part of it that the cache held.
        """
        num_input_tokens = self.num_prompt_tokens - (num_cached_tokens if self.marks_cache_points else 0)
        return {
            "input_tokens": num_input_tokens,
            "output_tokens": num_output_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": num_cached_tokens,
        }
