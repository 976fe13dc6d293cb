"""Plain facts about machines."""

from __future__ import annotations

from cluster.dist.topology import Device, Link, Node, Topology

GPU = Device(index=0, kind="H100", memory_bytes=80 << 30)
NODES = (
    Node(node_id="a", host="10.0.0.1", cores=8, memory_bytes=64 << 30),
    Node(node_id="b", host="10.0.0.2", cores=16, memory_bytes=128 << 30, devices=(GPU,)),
)


def test_totals_and_devices() -> None:
    topology = Topology(nodes=NODES)
    assert topology.cores == 24
    assert topology.devices == ((NODES[1], GPU),)


def test_links_have_no_direction() -> None:
    link = Link(source="a", target="b", bandwidth_bytes_per_s=1e10, latency_s=1e-5)
    topology = Topology(nodes=NODES, links=(link,))
    assert topology.link("b", "a") is link
    assert topology.link("a", "a") is None
