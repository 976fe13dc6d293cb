"""Which node each replica is foreseen on, and what is left there. Pure.

A tensor-parallel replica is one unit: all its ranks and its leader share a node. Of an
expert-parallel one each tensor-parallel group is a unit, and groups fill few nodes. Ray places for
real; this tells beforehand whether it can, and how many ranks share a node's cores and memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.dist.topology import Topology
from cluster.planner.decisions import front_cpus
from cluster.planner.memory import FRONT_PROCESS_BYTES, cpu_budget_bytes

_ROUNDING = 1e-9
"""Sums of tenths of CPUs are not exact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankNeed:
    """What one CPU rank takes of its node."""

    num_bytes: int
    cpus: float = 0.0
    """Logical CPUs that the file asks for by number; 0: a share of what others leave."""


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
    asked_cpus: float = 0.0
    """Logical CPUs of the ranks here whose file asks for a number."""

    @property
    def free_cpus(self) -> float:
        """Logical CPUs left to ask for beside gateways, leaders and one leader more."""
        num_front = self.num_gateways + self.num_leaders + 1
        return self.cores - num_front * front_cpus(self.cores, num_front) - self.asked_cpus

    def add_replica(self, model: int, num_ranks: int, need: RankNeed | None) -> None:
        """Put a replica here; `need` is None for ranks that live on GPUs."""
        self.add_leader()
        self.add_ranks(model, num_ranks, need)

    def add_leader(self) -> None:
        """Put a replica's leader here."""
        self.num_leaders += 1
        self.free_bytes -= FRONT_PROCESS_BYTES

    def add_ranks(self, model: int, num_ranks: int, need: RankNeed | None) -> None:
        """Put ranks here; `need` is None for those that live on GPUs."""
        self.num_ranks += num_ranks
        if need is not None:
            self.free_bytes -= num_ranks * need.num_bytes
            self.asked_cpus += num_ranks * need.cpus
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
    loads: Sequence[NodeLoad], num_ranks: int, needs: Sequence[RankNeed]
) -> int | None:
    """The node with the fewest ranks per core among those with the memory; None if there is none.

    Of these the ones that have the CPUs which are asked for by number, if any has. Ties go to the
    first node, so that equal inputs give equal plans.

    Args:
        needs: what a rank would take of each node.
    """
    fitting = [
        index
        for index, load in enumerate(loads)
        if load.free_bytes >= num_ranks * needs[index].num_bytes + FRONT_PROCESS_BYTES
    ]
    if not fitting:
        return None
    with_cpus = [
        index
        for index in fitting
        if loads[index].free_cpus + _ROUNDING >= num_ranks * needs[index].cpus
    ]
    fitting = with_cpus or fitting
    return min(fitting, key=lambda index: (loads[index].num_ranks + num_ranks) / loads[index].cores)


def fewest_nodes(
    loads: Sequence[NodeLoad], num_groups: int, group_size: int, need: RankNeed
) -> list[int] | None:
    """A node for each group of ranks, in node order; None when they do not fit together.

    The nodes with most room take as many groups as they have memory for, but as long as others have
    some no more than they have CPUs for: those asked for by number, else a core for each rank.
    """
    for respects_cores in (True, False):
        rooms = [
            _group_room(load, group_size, need, respects_cores=respects_cores) for load in loads
        ]
        nodes: list[int] = []
        for node in sorted(range(len(loads)), key=lambda index: (-rooms[index], index)):
            nodes += [node] * min(rooms[node], num_groups - len(nodes))
        if len(nodes) == num_groups:
            return sorted(nodes, key=lambda node: (node != nodes[0], node))
    return None


def _group_room(load: NodeLoad, group_size: int, need: RankNeed, *, respects_cores: bool) -> int:
    """Groups that a node can take, a leader among them."""
    room = max(0, load.free_bytes - FRONT_PROCESS_BYTES) // (group_size * need.num_bytes)
    if not respects_cores:
        return room
    cpus = load.free_cpus + _ROUNDING if need.cpus else load.cores - load.num_ranks
    return min(room, int(max(0, cpus) / (group_size * (need.cpus or 1))))
