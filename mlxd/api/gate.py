"""The gate: who asks, and whether they may now.

It does not know paths: what needs no key never comes here.
"""

from __future__ import annotations

from mlxd.api.auth import ApiKeys
from mlxd.api.caller import Caller
from mlxd.api.http import HTTPRequest
from mlxd.api.limits import RateLimiter
from mlxd.api.proxies import UNIX, TrustedProxies, network_of


class Gate:
    """Keys, addresses and limits together."""

    __slots__ = ("_isolates_keys", "_keys", "_limiter", "_proxies")

    def __init__(
        self, keys: ApiKeys, proxies: TrustedProxies, limiter: RateLimiter, *, isolates_keys: bool
    ) -> None:
        self._keys = keys
        self._isolates_keys = isolates_keys
        self._proxies = proxies
        self._limiter = limiter

    def admit(self, request: HTTPRequest, *, counted: bool) -> None:
        """Set the request's caller; count it where it is `counted`.

        Raises:
            AuthenticationError: no key, or a wrong one.
            RateLimitError: one request too many.
        """
        address = self._proxies.client_address(request)
        if address != (request.peer or UNIX):
            request.access["client"] = address
        address = network_of(address)
        key = self._keys.authenticate(request)
        account = self._limiter.account(key, address)
        if key is None:
            request.caller = Caller(address=address, account=account)
        else:
            request.access["key"] = key.name
            request.caller = Caller(
                key.name,
                address,
                key.priority,
                key.weight,
                key.cache_salt or (key.name if self._isolates_keys else ""),
                is_admin=key.admin or len(self._keys) == 1,
                account=account,
            )
        if counted:
            account.take_request()
