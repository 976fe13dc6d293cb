"""Between nodes first: one copy of a row per node, then one per rank inside the node.

The row crosses along its sender's rail to a forwarder, which passes it on to the ranks of its node
that need it. Partial sums come back the same way and are added at the rank, at the forwarder and at
the source, so the way back is as thin as the way there; they are exact, so where a sum was added up
does not show. Messages between nodes fall by the number of ranks a node has; the price is the
second hop.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cluster.dist.rank_topology import RankTopology
from moe.exchange.answers import Leg
from moe.exchange.base import Arrivals
from moe.exchange.flat import SlotHomes
from moe.exchange.hops import Trip
from moe.plan import NOWHERE, RowPlan


class Route:
    """Which member of the rail takes rows for a node, and which ranks are on this node.

    Args:
        topology: of the whole group.
        rank: this rank.
    """

    def __init__(self, topology: RankTopology, rank: int) -> None:
        rail = topology.rail_ranks(rank)
        member_of_node = [
            rail.index(topology.forwarder(rank, node)) for node in range(topology.num_nodes)
        ]
        self.num_rail_members = len(rail)
        self.num_node_members = len(topology.node_ranks(rank))
        node_of_rank = topology.node_of_rank
        # Both have one entry more, reached by index -1, for what is nowhere.
        self._rail_member_W = torch.tensor(
            [member_of_node[node] for node in node_of_rank] + [NOWHERE]
        )
        self._node_member_W = torch.tensor(
            [
                topology.local_rank(other) if node == topology.node_index(rank) else NOWHERE
                for other, node in enumerate(node_of_rank)
            ]
            + [NOWHERE]
        )

    def rail_members(self, rank_S: torch.Tensor) -> torch.Tensor:
        """From the ranks of a layer's experts to the rail members that forward to them."""
        return self._rail_member_W[rank_S]

    def node_members(self, rank_S: torch.Tensor) -> torch.Tensor:
        """From the ranks of a layer's experts to those on this node, by local index."""
        return self._node_member_W[rank_S]


class TwoHopExchange:
    """An exchange over rail and node; `hierarchical` with streams, `preposted` with slots.

    Args:
        name: of the scheme.
        legs: along the rail and inside the node.
        route: this rank's place.
        where: the layer's experts.
        layer: how errors name it.
    """

    def __init__(
        self,
        *,
        name: str,
        legs: tuple[Leg, Leg],
        route: Route,
        where: SlotHomes,
        layer: str,
    ) -> None:
        self.name = name
        self._rail, self._node = legs
        self._route = route
        self._where = where
        self._rail_member_S = route.rail_members(where.rank_S)
        self._node_member_S = route.node_members(where.rank_S)
        self._layer = layer

    def dispatch(
        self, hidden_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> TwoHopPending:
        """Start to send each row once to every node it visits."""
        where = self._where
        plan = where.moves.plan(expert_TK, self._rail_member_S, self._route.num_rail_members)
        trip = self._rail.open([where.format.pack(hidden_TD, expert_TK, weight_TK)], plan)
        return TwoHopPending(self, plan, trip)

    def forward(self, plan: RowPlan, trip: Trip) -> Arrivals:
        """The second half of a dispatch: wait for the rail, pass on inside the node, wait."""
        pieces = trip.arrive(f"{self._layer} dispatch between nodes")
        where = self._where
        inner_plan = where.moves.plan(
            where.moves.experts(where.format, pieces),
            self._node_member_S,
            self._route.num_node_members,
        )
        inner_trip = self._node.open(pieces, inner_plan)
        arrived = inner_trip.arrive(f"{self._layer} dispatch inside the node")
        ticket = _Ticket(plan, trip, inner_plan, inner_trip)
        return where.unpack(arrived, ticket)

    def combine(self, partial_AD: torch.Tensor, arrivals: Arrivals) -> torch.Tensor:
        """Partial sums home: added per node by the forwarder, then per row by the source."""
        ticket: _Ticket = arrivals.ticket
        at_forwarder = self._node.answers.bring_home(
            ticket.inner_trip,
            ticket.inner_plan,
            partial_AD,
            f"{self._layer} combine inside the node",
        )
        at_source = self._rail.answers.bring_home(
            ticket.trip, ticket.plan, at_forwarder, f"{self._layer} combine between nodes"
        )
        return at_source.rounded()


@dataclass(frozen=True, slots=True)
class _Ticket:
    plan: RowPlan
    trip: Trip
    inner_plan: RowPlan
    inner_trip: Trip


@dataclass(frozen=True, slots=True)
class TwoHopPending:
    """Rows on their way along the rail."""

    exchange: TwoHopExchange
    plan: RowPlan
    trip: Trip

    def wait(self) -> Arrivals:
        """The arrived rows and their local experts."""
        return self.exchange.forward(self.plan, self.trip)
