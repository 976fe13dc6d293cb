"""Which rank of a group lives on which node: torch-free arithmetic over a given list.

Ranks are grouped by node, so a node is a range of ranks. A rail joins the ranks with the same
local index on all nodes: what is sent between nodes goes along a rail, one connection per pair of
nodes and rail. Nodes may hold unequal numbers of ranks: there are as many rails as the smallest
node has ranks, and further ranks of a larger node share a rail with an earlier one of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from cluster.base.errors import ConfigError


def order_by_node(node_ids: Sequence[str]) -> tuple[int, ...]:
    """The permutation that groups members by node, nodes in order of first appearance.

    Entry `i` of the answer is the present index of what becomes rank `i`; members of one node keep
    their order.
    """
    first_seen = {name: index for index, name in reversed(list(enumerate(node_ids)))}
    return tuple(sorted(range(len(node_ids)), key=lambda index: first_seen[node_ids[index]]))


@dataclass(frozen=True)
class RankTopology:
    """The node of every rank.

    Args:
        node_of_W: node name of each rank; ranks of one node stand together.
        name_of_W: the number by which messages call each rank, where some of a larger group meet
            without the others; none: their own.

    Raises:
        ConfigError: no rank at all, or the ranks of a node do not stand together.
    """

    node_of_W: tuple[str, ...]
    name_of_W: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.node_of_W:
            raise ConfigError("A group needs at least one rank.")
        if order_by_node(self.node_of_W) != tuple(range(self.num_ranks)):
            raise ConfigError(
                f"Ranks are not ordered by node: {self.node_of_W}.",
                "Renumber them with order_by_node.",
            )

    @classmethod
    def regular(cls, num_nodes: int, ranks_per_node: int) -> RankTopology:
        """Equal nodes named node0, node1 and so on."""
        return cls(tuple(f"node{n}" for n in range(num_nodes) for _ in range(ranks_per_node)))

    @property
    def num_ranks(self) -> int:
        """Ranks of the whole group."""
        return len(self.node_of_W)

    @property
    def num_nodes(self) -> int:
        """Nodes that hold at least one rank."""
        return len(self.nodes)

    @cached_property
    def nodes(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of each node."""
        by_name: dict[str, list[int]] = {}
        for rank, name in enumerate(self.node_of_W):
            by_name.setdefault(name, []).append(rank)
        return tuple(tuple(ranks) for ranks in by_name.values())

    @cached_property
    def node_of_rank(self) -> tuple[int, ...]:
        """Index into `nodes` of each rank's node."""
        return tuple(index for index, ranks in enumerate(self.nodes) for _ in ranks)

    @property
    def num_rails(self) -> int:
        """Ranks of the smallest node."""
        return min(len(ranks) for ranks in self.nodes)

    @property
    def has_two_levels(self) -> bool:
        """Several nodes with several ranks each: only then a hop between nodes differs from all."""
        return self.num_nodes > 1 and self.num_rails > 1

    def node_index(self, rank: int) -> int:
        """Index of the rank's node."""
        return self.node_of_rank[rank]

    def local_rank(self, rank: int) -> int:
        """Index of the rank on its own node."""
        return rank - self.node_ranks(rank)[0]

    def node_ranks(self, rank: int) -> tuple[int, ...]:
        """The ranks on this rank's node, itself included."""
        return self.nodes[self.node_index(rank)]

    def rail_ranks(self, rank: int) -> tuple[int, ...]:
        """The ranks that share this rank's rail, itself included, in rank order."""
        rail = self.local_rank(rank) % self.num_rails
        return tuple(
            other
            for other in range(self.num_ranks)
            if self.local_rank(other) % self.num_rails == rail
        )

    def forwarder(self, rank: int, node: int) -> int:
        """Who takes in this rank's rows for a node: itself at home, else its rail's first there."""
        if node == self.node_index(rank):
            return rank
        return self.nodes[node][self.local_rank(rank) % self.num_rails]

    def describe(self, rank: int) -> str:
        """How messages name a rank."""
        return f"rank {self.name(rank)} (node {self.node_of_W[rank]})"

    def name(self, rank: int) -> int:
        """The number by which messages call a rank."""
        return self.name_of_W[rank] if self.name_of_W else rank
