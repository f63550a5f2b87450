"""What the embedding engine is asked for.

It does not know texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EmbeddingInput:
    """One sequence. `token_types` are empty, or one a token: 1 for the second text of a pair.

    The first `num_prompt_tokens` are a prompt, which some models leave out when they pool.
    """

    token_ids: Sequence[int]
    num_prompt_tokens: int = 0
    token_types: Sequence[int] = ()
