"""Whom a request comes from, as far as the proxies in front can be believed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mlxd.api.http import HTTPRequest
from mlxd.api.proxies import TrustedProxies, network_of
from mlxd.errors import ConfigError
from tests.unit.api.fakes import FakeEngine, make_app


def request(peer: str | None, *forwarded: str) -> HTTPRequest:
    headers = [(b"x-forwarded-for", value.encode("latin-1")) for value in forwarded]
    scope = {"method": "GET", "path": "/", "headers": headers, "client": (peer, 5) if peer else None}
    return HTTPRequest(scope, asyncio.Queue().get, asyncio.Queue().put)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("trusted", "peer", "forwarded", "expected"),
    [
        # Nobody is trusted: the header is any client's to write.
        ([], "9.9.9.9", ["1.1.1.1"], "9.9.9.9"),
        (["10.0.0.0/8"], "9.9.9.9", ["1.1.1.1"], "9.9.9.9"),
        # One proxy, and two that are trusted, and what stands before the client's own address.
        (["10.0.0.0/8"], "10.1.1.1", ["1.1.1.1"], "1.1.1.1"),
        (["10.0.0.0/8"], "10.1.1.1", ["6.6.6.6, 1.1.1.1, 10.2.2.2"], "1.1.1.1"),
        (["10.0.0.0/8"], "10.1.1.1", ["6.6.6.6", "1.1.1.1", "10.2.2.2"], "1.1.1.1"),
        (["10.0.0.0/8"], "10.1.1.1", ["6.6.6.6, 1.1.1.1, 9.9.9.9"], "9.9.9.9"),
        # No header, or nothing but proxies: the farthest that is known.
        (["10.0.0.0/8"], "10.1.1.1", [], "10.1.1.1"),
        (["10.0.0.0/8"], "10.1.1.1", ["10.3.3.3, 10.2.2.2"], "10.3.3.3"),
        # What is no address ends the search.
        (["10.0.0.0/8"], "10.1.1.1", ["1.1.1.1, unknown"], "10.1.1.1"),
        (["10.0.0.0/8"], "10.1.1.1", ["1.1.1.1, \xff, 10.2.2.2"], "10.2.2.2"),
        (["10.0.0.0/8"], "10.1.1.1", [""], "10.1.1.1"),
        # Ports, brackets, zones, IPv4 in IPv6, single addresses.
        (["10.1.1.1"], "10.1.1.1", ["1.1.1.1:4711"], "1.1.1.1"),
        (["10.1.1.1"], "10.1.1.1", ["[2001:db8::1]:4711"], "2001:db8::1"),
        (["fd00::/8"], "fd00::1", ["2001:db8::1"], "2001:db8::1"),
        (["fe80::/10"], "fe80::1%eth0", ["1.1.1.1"], "1.1.1.1"),
        (["10.0.0.0/8"], "::ffff:10.1.1.1", ["::ffff:1.1.1.1"], "1.1.1.1"),
        # Unix sockets.
        ([], None, ["1.1.1.1"], "unix"),
        (["unix"], None, ["1.1.1.1"], "1.1.1.1"),
        (["unix", "10.0.0.0/8"], None, ["1.1.1.1, 10.1.1.1"], "1.1.1.1"),
        (["unix"], None, [], "unix"),
        (["unix"], "9.9.9.9", ["1.1.1.1"], "9.9.9.9"),
        # A peer that is no address (some ASGI servers).
        (["10.0.0.0/8"], "testclient", ["1.1.1.1"], "testclient"),
    ],
)
def test_client_address(trusted: list[str], peer: str | None, forwarded: list[str], expected: str) -> None:
    assert TrustedProxies(trusted).client_address(request(peer, *forwarded)) == expected


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("1.2.3.4", "1.2.3.4"),
        ("unix", "unix"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("::ffff:1.2.3.4", "1.2.3.4"),
        ("no:address", "no:address"),
    ],
)
def test_a_client_is_an_ipv4_address_or_an_ipv6_network(address: str, network: str) -> None:
    assert network_of(address) == network


@pytest.mark.parametrize("entry", ["10.0.0.0/99", "proxy.example", ""])
def test_what_is_no_network_is_a_configuration_error(entry: str) -> None:
    with pytest.raises(ConfigError, match="is no address, network or 'unix'"):
        make_app(FakeEngine(), {"server": {"trusted_proxies": [entry]}})


def test_limits_are_by_the_forwarded_address() -> None:
    async def main() -> None:
        config = {"server": {"trusted_proxies": ["10.0.0.0/8"]}, "limits": {"rate_limit": 1}}
        app = make_app(FakeEngine(), config)

        async def ask(address: str) -> Any:
            sent: list[Any] = []

            async def send(message: Any) -> None:
                sent.append(message)

            inbox: asyncio.Queue[Any] = asyncio.Queue()
            inbox.put_nowait({"type": "http.request", "body": b'{"prompt":"a"}', "more_body": False})
            access: dict[str, Any] = {}
            scope = {
                "type": "http",
                "method": "POST",
                "path": "/tokenize",
                "headers": [(b"x-forwarded-for", address.encode())],
                "client": ("10.0.0.1", 5),
                "extensions": {"mlxd.access_log": access},
            }
            await app(scope, inbox.get, send)
            assert access["client"] == address
            return sent[0]["status"]

        assert [await ask("1.1.1.1"), await ask("1.1.1.1"), await ask("2.2.2.2")] == [200, 429, 200]
        assert [await ask("2001:db8::1"), await ask("2001:db8::2")] == [200, 429]

    asyncio.run(main())
