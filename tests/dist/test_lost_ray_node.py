"""A node with a rank on it dies: its bundle moves to another, and the replica is whole again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.netrig.rig import NetRig, why_not
from tests.dist.test_ray_nodes import CLUSTER, GATEWAY, LINK, Head, expected
from tests.support.ray_nodes import RayNodes

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(bool(why_not()), reason=f"cannot emulate nodes: {why_not()}"),
]

PATIENCE_S = 100.0


@pytest.fixture
def rig():
    with NetRig(3, LINK) as three_nodes:
        yield three_nodes


Replica = dict[str, Any]


def replica_when(head: Head, holds: Callable[[Replica], bool], what: str) -> Replica:
    """The replica's record as soon as it is as it should be."""
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        status = json.loads(head.penstock("status", "--json", "--address", GATEWAY))
        if status["replicas"] and holds(status["replicas"][0]):
            record: Replica = status["replicas"][0]
            return record
        assert time.monotonic() < deadline_s, f"not {what}: {status['replicas']}"
        time.sleep(0.5)


def rig_node(folder: Path, pid: int, candidates: tuple[int, ...]) -> int:
    """On which of some nodes a rank's process writes its log."""
    found = [n for n in candidates if list(folder.glob(f"node{n}/session_*/logs/worker-*-{pid}.*"))]
    assert len(found) == 1, found
    return found[0]


def logged(folder: Path, text: str) -> bool:
    """Whether some process of some node has said so."""
    logs = folder.glob("node*/session_*/logs/*")
    return any(text in log.read_text(errors="replace") for log in logs if log.is_file())


def test_a_rank_whose_node_has_died_comes_back_on_another(rig, tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text(f"{CLUSTER}    moe: {{failover: {{lost_groups: 1}}}}\n")
    # With one CPU a node takes one rank: of three nodes one is left over.
    nodes = RayNodes(rig, tmp_path, cpus=1)
    try:
        head = Head(nodes, tmp_path)
        head.up(file)
        before = replica_when(head, lambda replica: replica["state"] == "ready", "ready")
        stays, goes = before["workers"]
        assert stays["node"] != goes["node"]
        assert head.tokens() == expected()

        victim = rig_node(tmp_path, goes["pid"], (1, 2))
        nodes.end(victim)
        lost = replica_when(head, lambda replica: replica["loss"] is not None, "degraded")
        assert lost["loss"]["ranks"] == [1]
        assert lost["loss"]["nodes"] == [rig.address(victim)]
        assert head.tokens() == expected()

        whole = replica_when(
            head, lambda r: r["loss"] is None and len(r["workers"]) == 2, "whole again"
        )
        same, moved = whole["workers"]
        assert whole["epoch"] == before["epoch"]
        assert (same["pid"], same["node"]) == (stays["pid"], stays["node"])
        assert (moved["rank"], moved["group"]) == (1, 1)
        assert moved["node"] not in (stays["node"], goes["node"])
        assert head.tokens() == expected()
        # The links of the new node are others.
        spare = rig.address(3 - victim)
        assert logged(tmp_path, f"measured anew: more ranks are on {spare}")
    finally:
        nodes.close()
