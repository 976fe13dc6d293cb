"""Where the ranks of one group first meet: an address, a port and a name.

Torch-free, so that the torch-free leader can choose the place. A group that is formed again after
a loss gets a new `epoch`: stragglers of the old one can then never join it.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """The store that rank 0 hosts and all ranks of a group connect to."""

    host: str
    port: int
    group: str = "tp"
    epoch: int = 0
    connect_timeout_s: float = 60.0

    @property
    def prefix(self) -> str:
        """Key prefix that separates groups and epochs in one store."""
        return f"{self.group}/{self.epoch}"


def pick_port(host: str) -> int:
    """A port of `host` (an address of this machine) that is free at this moment.

    Somebody else may take it before rank 0 listens there; rank 0 then fails with a plain error and
    the group is formed again elsewhere.

    Raises:
        OSError: `host` is not an address of this machine.
    """
    with socket.create_server((host, 0), family=_family(host)) as listener:
        port: int = listener.getsockname()[1]
        return port


def listen(host: str, port: int) -> socket.socket:
    """A listening socket bound to exactly `host`, for the store to adopt.

    Raises:
        OSError: the address is in use or not ours.
    """
    return socket.create_server((host, port), family=_family(host), backlog=1024)


def local_address_towards(host: str, port: int) -> str:
    """The address of this machine that a peer at `host` would see; sends no packet.

    Raises:
        OSError: `host` cannot be resolved or there is no route to it.
    """
    with socket.socket(_family(host), socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        address: str = probe.getsockname()[0]
        return address


def _family(host: str) -> socket.AddressFamily:
    return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
