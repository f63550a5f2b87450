"""Who is at the other end: the address of the connection, or the one that a trusted proxy vouches for.

It does not know keys or limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)

from mlxd.api.http import HTTPRequest
from mlxd.errors import ConfigError

UNIX = "unix"
"""The address of whoever connects to a Unix socket; in server.trusted_proxies: trust them."""
IPV6_CLIENT_BITS = 64
"""A customer gets at least a /64 (RFC 6177), so everybody in one counts as one client."""


class TrustedProxies:
    """Whose X-Forwarded-For is believed.

    The header is read from its end, as each proxy appends whom it saw: the first address that is not a
    trusted proxy's is the client's. What the client itself wrote stands before that and is never reached.
    """

    def __init__(self, entries: Sequence[str]) -> None:
        """`entries`: addresses, networks in CIDR notation, or `unix`. Raises ConfigError."""
        self._trusts_unix = UNIX in entries
        self._networks: list[IPv4Network | IPv6Network] = []
        for entry in entries:
            if entry != UNIX:
                try:
                    self._networks.append(ip_network(entry, strict=False))
                except ValueError:
                    raise ConfigError(f"{entry!r} is no address, network or {UNIX!r}") from None

    def client_address(self, request: HTTPRequest) -> str:
        """The client's address, or `unix` where all that is known is a Unix socket."""
        peer = request.peer
        address = None
        if peer is None:
            trusted = self._trusts_unix
        elif self._networks:
            address = _parse(peer)
            trusted = self._is_trusted(address)
        else:
            return peer
        if trusted:
            for hop in reversed(b",".join(request.header_values(b"x-forwarded-for")).split(b",")):
                seen = _parse(hop.decode("latin-1"))
                if seen is None:
                    break  # no address: the last hop that is one has to do
                address = seen
                if not self._is_trusted(seen):
                    break
        if address is None:
            return UNIX if peer is None else peer
        return str(address)

    def _is_trusted(self, address: IPv4Address | IPv6Address | None) -> bool:
        return address is not None and any(address in network for network in self._networks)


def network_of(address: str) -> str:
    """By what the holder of `address` is told from others."""
    if ":" not in address:
        return address
    parsed = _parse(address)
    if not isinstance(parsed, IPv6Address):
        return address if parsed is None else str(parsed)
    return str(IPv6Network((parsed, IPV6_CLIENT_BITS), strict=False))


def _parse(text: str) -> IPv4Address | IPv6Address | None:
    """`1.2.3.4`, `1.2.3.4:567`, `::1`, `[::1]`, `[::1]:567`; IPv4 in IPv6 as IPv4."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address
