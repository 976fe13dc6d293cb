"""Addresses and ports of the meeting place."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from cluster.dist.rendezvous import Rendezvous, listen, local_address_towards, pick_port


def test_a_picked_port_can_be_listened_on_and_only_there() -> None:
    port = pick_port("127.0.0.1")
    with listen("127.0.0.1", port) as listener:
        assert listener.getsockname() == ("127.0.0.1", port)
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            pass


def test_foreign_addresses_are_refused() -> None:
    with pytest.raises(OSError, match="assign"):
        pick_port("192.0.2.1")


def test_loopback_faces_loopback() -> None:
    assert local_address_towards("127.0.0.1", 9) == "127.0.0.1"


def test_epochs_do_not_share_keys() -> None:
    first = Rendezvous(host="h", port=1, group="tp", epoch=0)
    assert first.prefix != Rendezvous(host="h", port=1, group="tp", epoch=1).prefix
    assert first.prefix != Rendezvous(host="h", port=1, group="ep", epoch=0).prefix


@pytest.mark.parametrize(
    "module",
    [
        "cluster.dist.rendezvous",
        "cluster.dist.mesh",
        "cluster.dist.topology",
        "cluster.dist.communicator",
        "replicas.models.hf_config",
        "replicas.models.memory",
        "replicas.models.checkpoint_files",
    ],
)
def test_the_leader_and_the_planner_need_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
