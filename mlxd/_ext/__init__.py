"""Compiled modules (sources in ext/): the work that is done for every token of every stream.

They know integers, bytes and str, and nothing of requests, HTTP or MLX. Each has a plain-Python twin in
tests/reference/, which the same tests drive.
"""


class IntegrityError(AssertionError):
    """Counts that must agree do not: a bug of ours. The message carries the numbers."""
