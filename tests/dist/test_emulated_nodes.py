"""Exchanges between nodes that only share a link: time, messages and bytes as counted on it."""

from __future__ import annotations

import statistics
import subprocess

import pytest

from bench.moe import run_on_nodes
from bench.netrig.rig import Link, NetRig, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=f"cannot emulate nodes: {why_not()}")

DELAY_S = 0.02
LISTEN = """
import socket
with socket.create_server(("10.77.0.2", 5000)) as server:
    print("up", flush=True)
    with server.accept()[0] as peer:
        while data := peer.recv(100):
            peer.sendall(data)
"""
TALK = """
import socket, time
with socket.create_connection(("10.77.0.2", 5000)) as peer:
    for _ in range(5):
        begin = time.monotonic()
        peer.sendall(b"abc")
        assert peer.recv(3) == b"abc"
        print(time.monotonic() - begin)
"""


def test_the_link_delays_and_counts_what_crosses():
    with NetRig(2, Link(delay_s=DELAY_S)) as rig:
        server = subprocess.Popen(rig.command(1, "python3", "-c", LISTEN), stdout=subprocess.PIPE)
        assert server.stdout.readline() == b"up\n"
        talk = subprocess.check_output(rig.command(0, "python3", "-c", TALK), timeout=20)
        server.wait(timeout=10)
        server.stdout.close()
        times = [float(line) for line in talk.split()]
        assert 2 * DELAY_S <= statistics.median(times) < 3 * DELAY_S
        wire = rig.control.wire()
        assert (wire.messages, wire.num_bytes) == (10, 30)


def test_a_contained_process_sees_only_its_own_node():
    with NetRig(1) as rig:
        command = rig.contained_command(0, "sh", "-c", "echo $$; ls /proc | grep -c '^[0-9]'")
        own_pid, num_processes = subprocess.check_output(command, timeout=20).split()
        assert int(own_pid) < 5
        assert int(num_processes) < 10


def test_schemes_between_nodes_that_share_a_slow_link():
    (answer,) = run_on_nodes(
        {
            "nodes": 2,
            "local": 2,
            "dim": 256,
            "experts": 8,
            "top_k": 4,
            "slot_rows": 32,
            "repeats": 3,
            "probes_s": [1.0],
            "links": [
                {
                    "name": "slow",
                    "shape": {"delay_s": DELAY_S, "message_s": 0.001},
                    "cases": [{"rows": 16, "max_nodes": 0}],
                }
            ],
        }
    )
    best_s = {scheme: min(times) for scheme, times in answer["times_s"].items()}
    messages = {scheme: min(w[0] for w in wires) for scheme, wires in answer["wires"].items()}
    num_bytes = {scheme: min(w[1] for w in wires) for scheme, wires in answer["wires"].items()}
    # Six delays against two; a busy machine adds to both.
    assert best_s["flat"] > 6 * DELAY_S
    for scheme in ("preposted", "hierarchical"):
        assert 2 * DELAY_S < best_s[scheme] < 0.75 * best_s["flat"]
    # Half as many pairs of ranks talk across, and a row crosses once, not once per rank.
    assert messages["hierarchical"] < 0.7 * messages["flat"]
    assert num_bytes["hierarchical"] < 0.7 * num_bytes["flat"]
    assert answer["chosen"] == ["hierarchical"]
    assert 0.5 * DELAY_S < answer["costs"]["node_delay_s"] < 5 * DELAY_S
