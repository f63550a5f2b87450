"""Running totals and short memories of the engine, for /v1/status, /metrics and retry-after.

It does not know who reads them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class EngineStats:
    """Totals since start; times in seconds, sizes in bytes."""

    num_steps: int = 0
    num_requests: int = 0
    """that ended, in whatever way"""
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    finish_reasons: Counter[str] = field(default_factory=Counter)
    num_integrity_errors: int = 0
    active_memory_bytes: int = 0
    peak_memory_bytes: int = 0
    cache_memory_bytes: int = 0
    mean_request_seconds: float = 0.0
    """running average of how long a request holds its slot"""

    def count_finished(self, reason: str, num_output_tokens: int, running_seconds: float | None) -> None:
        self.num_requests += 1
        self.num_output_tokens += num_output_tokens
        self.finish_reasons[str(reason)] += 1
        if running_seconds is not None:
            self.mean_request_seconds += 0.1 * (running_seconds - self.mean_request_seconds)
