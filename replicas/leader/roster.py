"""Which ranks of an expert-parallel replica serve, and what each holds; and who could go on. Pure.

A tensor-parallel group serves whole or not at all: when one of its ranks is lost, its others have
half an attention layer each, so they are let go and the group is replaced together. Experts of lost
ranks go to survivors, into no more slots than were planned for (`moe/reassign.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.base.errors import UnavailableError
from cluster.base.plan import ModelPlan
from cluster.dist.rank_topology import order_by_node
from moe.expert_table import ExpertTable
from moe.reassign import reassign, spare_slots
from replicas.worker.gathering import Gathering

Place = tuple[str, int]
"""Host and port."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Muster:
    """Ranks that are to serve together, and where the experts are among them."""

    members: tuple[int, ...]
    """Ranks, node by node: whole groups."""
    tables: tuple[ExpertTable, ...]
    """By layer; their ranks are indices into `members`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Under which epoch a muster meets, and where."""

    epoch: str
    peers: Place
    tensor_groups: Mapping[int, Place]
    """By group."""
    table: int = 0
    """Version of the placement of the experts."""
    costs: bytes = b""
    """Of the links, as `Gathering` has them."""
    probes: bool = False
    """The members measure them anew."""


class Roster:
    """The ranks of one replica.

    Args:
        nodes: node of each rank.
        tables: where all ranks began.
    """

    def __init__(
        self, plan: ModelPlan, nodes: Sequence[str], tables: Sequence[ExpertTable]
    ) -> None:
        lost_groups = plan.experts.lost_groups if plan.experts is not None else 0
        self._tp_size = plan.tp_size
        self._nodes = tuple(nodes)
        self._rooms = {
            table.layer: [
                count + (spare_slots(table, plan.tp_size, lost_groups) if lost_groups else 0)
                for count in table.slots.counts
            ]
            for table in tables
        }
        everybody = tuple(range(plan.num_ranks))
        self._full = self.now = Muster(members=everybody, tables=tuple(tables))
        """Who serves now."""

    @property
    def groups(self) -> tuple[int, ...]:
        """Groups that serve now."""
        return self._groups_of(self.now.members)

    @property
    def lost(self) -> tuple[int, ...]:
        """Ranks that do not serve now."""
        return tuple(rank for rank in self._full.members if rank not in self.now.members)

    def nodes_of(self, muster: Muster) -> tuple[str, ...]:
        """Node of each member."""
        return tuple(self._nodes[rank] for rank in muster.members)

    def without(self, present: Collection[int], tables: Sequence[ExpertTable]) -> Muster:
        """Those of the present members that can serve alone.

        Args:
            present: ranks that live.
            tables: where the experts are now, among the members.

        Raises:
            UnavailableError: no group is whole, or those that are have no room for all experts.
        """
        if not self.lost:
            self._full = Muster(members=self._full.members, tables=tuple(tables))
        left = tuple(
            rank
            for rank in self.now.members
            if all(peer in present for peer in self._peers_of(rank))
        )
        if not left:
            raise UnavailableError(
                "No tensor-parallel group has all its ranks left.", "Raise parallel.dp."
            )
        indices = [self.now.members.index(rank) for rank in left]
        placed = []
        for table in tables:
            rooms = self._rooms[table.layer]
            found = reassign(table, indices, [rooms[rank] for rank in left])
            if found is None:
                raise self._too_few(table, left)
            placed.append(found)
        return Muster(members=left, tables=tuple(placed))

    def whole(self) -> Muster:
        """All ranks, with the experts where they were before any was lost."""
        return self._full

    def tables_by_rank(self) -> tuple[ExpertTable, ...]:
        """Those of `whole`, by rank."""
        members = self._full.members
        return _permuted(self._full.tables, [members.index(rank) for rank in sorted(members)])

    def seat(self, nodes: Sequence[str]) -> None:
        """Learn that lost ranks have been replaced on other nodes, before all gather again.

        Ranks of one node have to stand together in a gathering: their order follows the nodes.

        Args:
            nodes: node of each rank.
        """
        self._nodes = tuple(nodes)
        ranks = sorted(self._full.members)
        members = tuple(ranks[index] for index in order_by_node([nodes[rank] for rank in ranks]))
        order = [self._full.members.index(rank) for rank in members]
        self._full = Muster(members=members, tables=_permuted(self._full.tables, order))

    def adopt(self, muster: Muster) -> None:
        """These serve from now on."""
        self.now = muster

    def gatherings(
        self, muster: Muster, meeting: Meeting, *, forgets_rows: bool
    ) -> dict[int, Gathering]:
        """What each member is told."""
        nodes = self.nodes_of(muster)
        told = {}
        for rank in muster.members:
            tensor_host, tensor_port = meeting.tensor_groups[rank // self._tp_size]
            told[rank] = Gathering(
                epoch=meeting.epoch,
                members=muster.members,
                nodes=nodes,
                peers_host=meeting.peers[0],
                peers_port=meeting.peers[1],
                tensor_host=tensor_host,
                tensor_port=tensor_port,
                tables=muster.tables,
                table=meeting.table,
                forgets_rows=forgets_rows,
                costs=meeting.costs,
                probes=meeting.probes,
            )
        return told

    def first_ranks(self, muster: Muster) -> tuple[int, ...]:
        """The first rank of each group that serves."""
        return tuple(group * self._tp_size for group in self._groups_of(muster.members))

    def _groups_of(self, ranks: Sequence[int]) -> tuple[int, ...]:
        return tuple(sorted({rank // self._tp_size for rank in ranks}))

    def _peers_of(self, rank: int) -> range:
        first = rank - rank % self._tp_size
        return range(first, first + self._tp_size)

    def _too_few(self, table: ExpertTable, left: Sequence[int]) -> UnavailableError:
        room, number = sum(self._rooms[table.layer][rank] for rank in left), table.slots.num_experts
        return UnavailableError(
            f"Ranks {list(left)} are left with room for {room} experts in layer {table.layer}, "
            f"which has {number}.",
            "Raise moe.failover.lost_groups or moe.redundant_experts.",
        )


def _permuted(tables: Sequence[ExpertTable], order: Sequence[int]) -> tuple[ExpertTable, ...]:
    """The same experts at the same ranks, which are counted in another order.

    Args:
        order: present index of what becomes rank 0, 1, 2 ...
    """
    if list(order) == list(range(len(order))):
        return tuple(tables)
    return tuple(
        replace(
            table,
            logical_by_rank=tuple(table.logical_by_rank[index] for index in order),
            shares=_permuted_shares(table, order),
        )
        for table in tables
    )


def _permuted_shares(table: ExpertTable, order: Sequence[int]) -> tuple[tuple[float, ...], ...]:
    """Shares are parallel to an expert's ranks in ascending order."""
    if not table.shares:
        return ()
    new_index = {old: new for new, old in enumerate(order)}
    return tuple(
        tuple(
            share
            for _, share in sorted(zip(map(new_index.__getitem__, homes), shares, strict=True))
        )
        for homes, shares in zip(table.placement().homes, table.shares, strict=True)
    )
