"""Listening sockets of the gateway's two fronts."""

from __future__ import annotations

import socket

from cluster.base.errors import ConfigError

BACKLOG = 1024


def listening_socket(host: str, port: int, param: str) -> socket.socket:
    """A TCP socket that shares its port (SO_REUSEPORT) with other gateways; port 0: a free one.

    Args:
        param: the key that says so, for the error.

    Raises:
        ConfigError: the address cannot be bound.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, proto)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(address)
            sock.listen(BACKLOG)
            sock.setblocking(False)
        except OSError:
            sock.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"The gateway cannot listen on {host}:{port}: {error.strerror or error}.",
            "Choose another address or end what uses it.",
            param=param,
        ) from error
    return sock
