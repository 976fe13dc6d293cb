"""Ports are looked at before anything starts, whatever family the address is of."""

import socket
from types import SimpleNamespace

import pytest

from cluster.base import names
from cluster.base.errors import ConfigError
from cluster.control.ports import check_dashboard_port, check_gateway_ports

HOSTS = ["127.0.0.1", "::1"]


def plan(host: str, grpc_port: int = 0, http_port: int = 0) -> SimpleNamespace:
    gateway = SimpleNamespace(host=host, grpc_port=grpc_port, http_port=http_port)
    return SimpleNamespace(gateway=gateway, dashboard_port=0)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("key", ["grpc_port", "http_port"])
def test_a_port_that_another_cluster_shares_is_taken(host, key):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind((host, 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"gateway.{key}") as caught:
            check_gateway_ports(plan(host, **{key: port}))
    assert names.authority(host, port) in caught.value.cause
    assert caught.value.param == f"gateway.{key}"


@pytest.mark.parametrize("host", [*HOSTS, "localhost"])
def test_free_ports_pass(host):
    check_gateway_ports(plan(host))
    check_dashboard_port(plan(host))


@pytest.mark.parametrize("host", ["203.0.113.1", "no address"])
def test_an_address_of_another_machine_is_named_by_its_key(host):
    with pytest.raises(ConfigError, match=host) as caught:
        check_gateway_ports(plan(host))
    assert caught.value.param == "gateway.host"


def test_ipv6_addresses_stand_in_brackets():
    assert names.authority("::1", 8000) == "[::1]:8000"
    assert names.authority("127.0.0.1", 8000) == "127.0.0.1:8000"
