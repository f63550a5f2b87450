"""Who asks: the client that a request is counted for, and what it may do.

It does not know how that was found out (gate.py does).
"""

from __future__ import annotations

from dataclasses import dataclass

from mlxd.api.limits import UNLIMITED, Account


@dataclass(frozen=True, slots=True)
class Caller:
    """A client. `name` is its key's, None where no key is needed; `address` is where it
    asks from, an IPv6 network where that is not IPv4.

    Its requests run with `priority` (lower first) or a less urgent one, and share the worker with those of
    others in proportion to `weight`. `is_admin`: it may do what concerns everybody; so may all where there
    is but one key, or none.
    """

    name: str | None = None
    address: str = ""
    priority: int = 0
    weight: float = 1.0
    cache_salt: str = ""
    is_admin: bool = True
    account: Account = UNLIMITED

    @property
    def client(self) -> str:
        """By which the engine tells clients apart."""
        return self.address if self.name is None else self.name


def joined_salt(of_key: str, of_request: str) -> str:
    """Both count, so a request cannot choose its way out of its key's; and "a", "bc" is not "ab", "c"."""
    return f"{len(of_key)} {of_key}{of_request}" if of_key or of_request else ""


NOBODY = Caller()
