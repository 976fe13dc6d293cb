"""The nodes of a joined Ray cluster as a `Topology` for the planner.

Ray knows how many GPUs a node has, not their memory; a node of another machine is planned with
`_GPU_BYTES_UNKNOWN` until its ranks report.
"""

from __future__ import annotations

from typing import Any

import ray

from cluster.base.errors import UnavailableError
from cluster.dist.topology import Device, Node, Topology

_GPU_BYTES_UNKNOWN = 16 << 30
"""Ray does not tell; the smallest data-centre card errs on the safe side."""


def ray_topology() -> Topology:
    """All living nodes of the connected Ray cluster: this one first, then by node id.

    The planner books the gateways on the first node, which is where they are started.

    Raises:
        UnavailableError: Ray reports no living node.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    if not alive:
        raise UnavailableError("The Ray cluster has no living node.", "Check `ray status`.")
    here = ray.get_runtime_context().get_node_id()
    alive.sort(key=lambda node: (node["NodeID"] != here, node["NodeID"]))
    return Topology(nodes=tuple(_node(node) for node in alive))


def _node(node: dict[str, Any]) -> Node:
    resources = node["Resources"]
    kind = next(
        (
            name.removeprefix("accelerator_type:")
            for name in resources
            if "accelerator_type" in name
        ),
        "GPU",
    )
    return Node(
        node_id=node["NodeID"],
        host=node["NodeManagerAddress"],
        cores=int(resources.get("CPU", 0)),
        memory_bytes=int(resources.get("memory", 0)),
        devices=tuple(
            Device(index=index, kind=kind, memory_bytes=_GPU_BYTES_UNKNOWN)
            for index in range(int(resources.get("GPU", 0)))
        ),
    )
