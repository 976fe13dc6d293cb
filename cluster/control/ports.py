"""Ports of this machine that a cluster is going to listen on, looked at before anything starts.

Gateways share their ports among themselves (SO_REUSEPORT), so that a second cluster on the same
ones would take half of the first one's connections without an error.
"""

from __future__ import annotations

import errno
import socket

from cluster.base import names
from cluster.base.errors import ConfigError
from cluster.base.plan import ClusterPlan


def check_gateway_ports(plan: ClusterPlan) -> None:
    """Refuse ports of the gateway that something else already listens on, or that cannot be.

    Raises:
        ConfigError: names the address and its key.
    """
    _check(plan.gateway.host, plan.gateway.grpc_port, "gateway.grpc_port")
    _check(plan.gateway.host, plan.gateway.http_port, "gateway.http_port")


def check_dashboard_port(plan: ClusterPlan) -> None:
    """The same for Ray's dashboard, where we start Ray.

    Raises:
        ConfigError: names the address and its key.
    """
    _check("127.0.0.1", plan.dashboard_port, "dashboard.port")


def _check(host: str, port: int, key: str) -> None:
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise _refusal(error, host, port, key) from error


def _refusal(error: OSError, host: str, port: int, key: str) -> ConfigError:
    cause = f"Cannot listen on {names.authority(host, port)} ({error.strerror or error})."
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        remedy = "Set gateway.host to an address of this machine, such as 127.0.0.1."
        return ConfigError(cause, remedy, param="gateway.host")
    if error.errno == errno.EACCES:
        return ConfigError(cause, f"Set {key} to a port above 1023.", param=key)
    return ConfigError(
        cause, f"Stop what uses it (`ss -ltnp`), or set {key} to a free port.", param=key
    )
