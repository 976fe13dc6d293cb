"""Which node each replica is foreseen on, and what is left there. Pure.

A tensor-parallel replica is one unit: all its ranks and its leader share a node. Of an
expert-parallel one each tensor-parallel group is a unit, and groups fill few nodes. Ray places for
real; this tells beforehand whether it can, and how many ranks share a node's cores and memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.dist.topology import Topology
from cluster.planner.memory import FRONT_PROCESS_BYTES, cpu_budget_bytes


@dataclass(slots=True, kw_only=True)
class NodeLoad:
    """What planning has put on one node so far."""

    host: str
    cores: int
    free_bytes: int
    """Left for CPU ranks; negative when gateways alone are too much."""
    num_gateways: int
    num_leaders: int = 0
    num_ranks: int = 0
    cpu_models: list[int] = field(default_factory=list)
    """Index of the model of every CPU rank here."""

    def add_replica(self, model: int, num_ranks: int, rank_bytes: int | None) -> None:
        """Put a replica here; `rank_bytes` is None for ranks that live on GPUs."""
        self.add_leader()
        self.add_ranks(model, num_ranks, rank_bytes)

    def add_leader(self) -> None:
        """Put a replica's leader here."""
        self.num_leaders += 1
        self.free_bytes -= FRONT_PROCESS_BYTES

    def add_ranks(self, model: int, num_ranks: int, rank_bytes: int | None) -> None:
        """Put ranks here; `rank_bytes` is None for those that live on GPUs."""
        self.num_ranks += num_ranks
        if rank_bytes is not None:
            self.free_bytes -= num_ranks * rank_bytes
            self.cpu_models += [model] * num_ranks


def empty_loads(topology: Topology, num_gateways: int) -> list[NodeLoad]:
    """The nodes before any replica; all gateways on the first."""
    return [
        NodeLoad(
            host=node.host,
            cores=node.cores,
            free_bytes=cpu_budget_bytes(node, num_gateways if index == 0 else 0),
            num_gateways=num_gateways if index == 0 else 0,
        )
        for index, node in enumerate(topology.nodes)
    ]


def least_loaded(
    loads: Sequence[NodeLoad], num_ranks: int, rank_bytes: Sequence[int]
) -> int | None:
    """The node with the fewest ranks per core among those with the memory; None if there is none.

    Ties go to the first node, so that equal inputs give equal plans.

    Args:
        rank_bytes: what a rank would take of each node.
    """
    fitting = [
        index
        for index, load in enumerate(loads)
        if load.free_bytes >= num_ranks * rank_bytes[index] + FRONT_PROCESS_BYTES
    ]
    if not fitting:
        return None
    return min(fitting, key=lambda index: (loads[index].num_ranks + num_ranks) / loads[index].cores)


def fewest_nodes(
    loads: Sequence[NodeLoad], num_groups: int, group_size: int, rank_bytes: int
) -> list[int] | None:
    """A node for each group of ranks, in node order; None when they do not fit together.

    The nodes with most room take as many groups as they have memory for, but no more ranks than
    cores as long as others have some.
    """
    for respects_cores in (True, False):
        rooms = [
            _group_room(load, group_size, rank_bytes, respects_cores=respects_cores)
            for load in loads
        ]
        nodes: list[int] = []
        for node in sorted(range(len(loads)), key=lambda index: (-rooms[index], index)):
            nodes += [node] * min(rooms[node], num_groups - len(nodes))
        if len(nodes) == num_groups:
            return sorted(nodes, key=lambda node: (node != nodes[0], node))
    return None


def _group_room(load: NodeLoad, group_size: int, rank_bytes: int, *, respects_cores: bool) -> int:
    """Groups that a node can take, a leader among them."""
    room = max(0, load.free_bytes - FRONT_PROCESS_BYTES) // (group_size * rank_bytes)
    if respects_cores:
        room = min(room, max(0, load.cores - load.num_ranks) // group_size)
    return room
