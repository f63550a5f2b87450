"""Binding: ports, families, stale and foreign Unix sockets."""

from __future__ import annotations

import errno
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from mlxd.config import ServerConfig
from mlxd.server import listener

V4 = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
V6 = (socket.AF_INET6, socket.SOCK_STREAM, 6, "")


def close(sockets: list[socket.socket]) -> None:
    for sock in sockets:
        sock.close()


def test_a_port_in_use() -> None:
    config = ServerConfig(host="127.0.0.1", port=0)
    [first] = listener.bind(config)
    first.listen()
    port = first.getsockname()[1]
    with pytest.raises(OSError, match="in use") as caught:
        listener.bind(ServerConfig(host="127.0.0.1", port=port))
    assert caught.value.filename == f"127.0.0.1:{port}"
    first.close()


def test_urls() -> None:
    sockets = listener.bind(ServerConfig(host="127.0.0.1", port=0))
    port = sockets[0].getsockname()[1]
    for host, expected in [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]"), ("0.0.0.0", "0.0.0.0")]:
        assert listener.url_of(sockets, ServerConfig(host=host)) == f"http://{expected}:{port}"
    close(sockets)


def resolving_to(*addresses: Any) -> Any:
    return lambda *args, **kwargs: list(addresses)


def test_port_0_is_one_port_for_all_families(monkeypatch: pytest.MonkeyPatch) -> None:
    v4, v6 = (*V4, ("127.0.0.1", 0)), (*V6, ("::1", 0, 0, 0))
    monkeypatch.setattr(socket, "getaddrinfo", resolving_to(v4, v6))
    sockets = listener.bind(ServerConfig(host="localhost", port=0))
    assert len({sock.getsockname()[1] for sock in sockets}) == 1
    assert sockets[0].family == socket.AF_INET
    if socket.has_ipv6:
        assert sockets[-1].family == socket.AF_INET6
    close(sockets)


def test_an_address_this_machine_lacks_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    # 192.0.2.0/24 is reserved for documentation: nobody has it.
    lacking, present = (*V4, ("192.0.2.1", 0)), (*V4, ("127.0.0.1", 0))
    monkeypatch.setattr(socket, "getaddrinfo", resolving_to(lacking, present, present))
    sockets = listener.bind(ServerConfig(host="x", port=0))
    assert [sock.getsockname()[0] for sock in sockets] == ["127.0.0.1"]
    close(sockets)
    monkeypatch.setattr(socket, "getaddrinfo", resolving_to(lacking, lacking))
    with pytest.raises(OSError, match="No such address here"):
        listener.bind(ServerConfig(host="x", port=0))
    monkeypatch.setattr(socket, "getaddrinfo", resolving_to(lacking))
    with pytest.raises(OSError) as caught:
        listener.bind(ServerConfig(host="x", port=0))
    assert caught.value.errno == errno.EADDRNOTAVAIL


def test_a_family_this_machine_lacks_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.socket

    def without_v6(family: int, *args: Any) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported")
        return real(family, *args)

    v4, v6 = (*V4, ("127.0.0.1", 0)), (*V6, ("::1", 0, 0, 0))
    monkeypatch.setattr(socket, "socket", without_v6)
    monkeypatch.setattr(socket, "getaddrinfo", resolving_to(v6, v4))
    sockets = listener.bind(ServerConfig(host="localhost", port=0))
    assert [sock.family for sock in sockets] == [socket.AF_INET]
    close(sockets)
    monkeypatch.setattr(socket, "getaddrinfo", resolving_to(v6))
    with pytest.raises(OSError, match="family"):
        listener.bind(ServerConfig(host="::1", port=0))


@pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is an address on Linux only")
def test_when_one_address_is_taken_none_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = socket.socket()
    taken.bind(("127.0.0.2", 0))
    taken.listen()
    port = taken.getsockname()[1]
    monkeypatch.setattr(
        socket, "getaddrinfo", resolving_to((*V4, ("127.0.0.1", port)), (*V4, ("127.0.0.2", port)))
    )
    with pytest.raises(OSError, match="in use"):
        listener.bind(ServerConfig(host="x", port=port))
    again = socket.socket()
    again.bind(("127.0.0.1", port))
    close([again, taken])


def test_a_stale_unix_socket_is_replaced(tmp_path: Path) -> None:
    config = ServerConfig(unix_socket=str(tmp_path / "s"))
    [dead] = listener.bind(config)
    dead.listen()
    dead.close()
    [sock] = listener.bind(config)
    sock.listen()
    inode = listener.inode_of(config.unix_socket)
    assert inode is not None
    with pytest.raises(OSError, match="Another server"):
        listener.bind(config)
    listener.release([sock], config, inode)
    assert not (tmp_path / "s").exists()
    listener.release([], config, inode)  # gone already


def test_a_busy_unix_socket_is_not_taken_for_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ServerConfig(unix_socket=str(tmp_path / "s"))
    [sock] = listener.bind(config)

    def refuse(self: socket.socket, path: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(OSError, match="Another server"):
        listener.bind(config)
    sock.close()


def test_another_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(OSError, match="no socket"):
        listener.bind(ServerConfig(unix_socket=str(path)))
    assert path.read_text() == "data"


def test_a_unix_path_that_cannot_be(tmp_path: Path) -> None:
    for path in (tmp_path / "missing" / "s", tmp_path / ("x" * 200)):
        with pytest.raises(OSError) as caught:
            listener.bind(ServerConfig(unix_socket=str(path)))
        assert caught.value.filename == str(path)
        assert caught.value.strerror


def test_a_successors_unix_socket_is_left_alone(tmp_path: Path) -> None:
    config = ServerConfig(unix_socket=str(tmp_path / "s"))
    [first] = listener.bind(config)
    inode = listener.inode_of(config.unix_socket)
    os.rename(tmp_path / "s", tmp_path / "old")  # keeps the inode in use
    [second] = listener.bind(config)
    listener.release([first], config, inode)
    assert (tmp_path / "s").exists()
    second.close()


def test_the_mode_of_the_process_is_restored(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        close(listener.bind(ServerConfig(unix_socket=str(tmp_path / "s"))))
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
