"""Rate limits: token buckets for requests and for tokens a minute, and quotas of tokens a day.

It does not know HTTP or keys. Clocks are arguments: `clock` is monotonic seconds, `wall_clock` Unix seconds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from mlxd.config import ApiKeyConfig, LimitsConfig
from mlxd.errors import RateLimitError

SECONDS_A_DAY = 86400
ROUNDING = 1e-6
"""Of a request or token: what floats may lack of the whole for which somebody has waited."""


class Bucket:
    """So much a minute, all of it at once if need be.

    `level` may fall below 0: what is generated is taken after the fact.
    """

    __slots__ = ("_clock", "_level", "_time", "per_minute")

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._time = clock()

    @property
    def level(self) -> float:
        """What may be taken now."""
        now = self._clock()
        self._level = min(self.per_minute, self._level + (now - self._time) * self.per_minute / 60)
        self._time = now
        return self._level

    def take(self, amount: float) -> None:
        self._level = self.level - amount

    def seconds_until(self, amount: float) -> float:
        """How long until the level is `amount`, or the bucket is full if that comes first; 0 when it is."""
        missing = min(amount, self.per_minute) - self.level
        return missing * 60 / self.per_minute if missing > ROUNDING else 0.0


class DailyQuota:
    """Tokens a day, by UTC. It lives as long as the process does."""

    __slots__ = ("_clock", "_day", "_used", "limit")

    def __init__(self, limit: int, wall_clock: Callable[[], float]) -> None:
        self.limit = limit
        self._clock = wall_clock
        self._day = 0
        self._used = 0

    @property
    def used(self) -> int:
        day = int(self._clock() // SECONDS_A_DAY)
        if day != self._day:
            self._day, self._used = day, 0
        return self._used

    def take(self, amount: int) -> None:
        self._used = self.used + amount

    def seconds_until_tomorrow(self) -> float:
        return SECONDS_A_DAY - self._clock() % SECONDS_A_DAY


@dataclass(frozen=True, slots=True)
class Account:
    """What one client may still ask for; None where there is no limit."""

    requests: Bucket | None = None
    tokens: Bucket | None = None
    quota: DailyQuota | None = None

    @property
    def limits_tokens(self) -> bool:
        return self.tokens is not None or self.quota is not None

    def take_request(self) -> None:
        """Count a request. Raises RateLimitError, and counts nothing, when it is one too many."""
        bucket = self.requests
        if bucket is None:
            return
        wait = bucket.seconds_until(1)
        if wait > 0:
            raise RateLimitError(
                f"rate limit reached: {bucket.per_minute} requests a minute; try again in {_duration(wait)}",
                retry_after=wait,
            )
        bucket.take(1)

    def check_tokens(self, num_tokens: int) -> None:
        """Whether a prompt of `num_tokens` may be taken now.

        One that is larger than a minute's tokens may as soon as the bucket is full, and leaves it in debt.

        Raises:
            RateLimitError: not now, or, with x-should-retry: false, not today.
        """
        quota, bucket = self.quota, self.tokens
        if quota is not None and quota.used + num_tokens > quota.limit:
            raise RateLimitError(
                f"the prompt has {num_tokens} tokens, and {max(0, quota.limit - quota.used)} of "
                f"{quota.limit} a day are left",
                retry_after=quota.seconds_until_tomorrow(),
                limit="quota",
                code="insufficient_quota",
                headers={"x-should-retry": "false"},
            )
        if bucket is None:
            return
        wait = bucket.seconds_until(num_tokens)
        if wait > 0:
            raise RateLimitError(
                f"rate limit reached: {bucket.per_minute} tokens a minute, and the prompt has {num_tokens}; "
                f"try again in {_duration(wait)}",
                retry_after=wait,
                limit="tokens",
            )

    def take_tokens(self, num_tokens: int) -> None:
        """Charge tokens that were taken or generated."""
        if self.tokens is not None:
            self.tokens.take(num_tokens)
        if self.quota is not None:
            self.quota.take(num_tokens)

    def headers(self) -> list[tuple[bytes, bytes]]:
        """OpenAI's x-ratelimit-*: limit, what remains, and how long until all of it does."""
        headers = []
        for name, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket is not None:
                reset = _duration(bucket.seconds_until(bucket.per_minute))
                for what, value in (
                    ("limit", bucket.per_minute),
                    ("remaining", max(0, int(bucket.level))),
                    ("reset", reset),
                ):
                    headers.append((f"x-ratelimit-{what}-{name}".encode(), str(value).encode()))
        return headers


class RateLimiter:
    """Everybody's account: a key's for as long as the server runs, an address's while it is in use.

    Of addresses, `max_tracked_clients` are remembered, those seen last. Who is forgotten starts with full
    buckets, as does everybody who has not asked for a minute.
    """

    def __init__(
        self, limits: LimitsConfig, clock: Callable[[], float], wall_clock: Callable[[], float]
    ) -> None:
        self._limits = limits
        self._clock = clock
        self._wall_clock = wall_clock
        self._by_key: dict[str, Account] = {}
        self._by_address: OrderedDict[str, Account] = OrderedDict()

    def __len__(self) -> int:
        """How many addresses are remembered."""
        return len(self._by_address)

    def account(self, key: ApiKeyConfig | None, address: str) -> Account:
        """That of the key, or, without one, that of the address."""
        if key is not None:
            account = self._by_key.get(key.name)
            if account is None:
                account = self._by_key[key.name] = self._open(key)
            return account
        if not self._limits.rate_limit and not self._limits.token_rate_limit:
            return UNLIMITED
        accounts = self._by_address
        account = accounts.get(address)
        if account is None:
            account = accounts[address] = self._open(ApiKeyConfig())
            if len(accounts) > self._limits.max_tracked_clients:
                accounts.popitem(last=False)
        else:
            accounts.move_to_end(address)
        return account

    def _open(self, key: ApiKeyConfig) -> Account:
        limits = self._limits
        return Account(
            self._bucket(limits.rate_limit if key.rate_limit is None else key.rate_limit),
            self._bucket(limits.token_rate_limit if key.token_rate_limit is None else key.token_rate_limit),
            None if key.token_quota is None else DailyQuota(key.token_quota, self._wall_clock),
        )

    def _bucket(self, per_minute: int) -> Bucket | None:
        return Bucket(per_minute, self._clock) if per_minute else None


UNLIMITED = Account()


def _duration(seconds: float) -> str:
    """As Go writes them, which is what OpenAI sends: `250ms`, `8s`, `1m30s`."""
    if seconds < 1:
        return f"{ceil(seconds * 1000)}ms"
    minutes, rest = divmod(ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
