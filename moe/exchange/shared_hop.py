"""A hop among the ranks of one node, through memory that they read from each other.

Every rank has two boxes: the copies of rows that it sends, in its plan's order, and the answers
that it gives, in the order of the rows that came. Who is told where its part begins reads it in
place, so no row is copied on the way and none is too many.

    open        write copies; tell every peer (first byte, rows, trip), also that there are none
    arrive      hear from every peer
    room        the box of answers
    give_back   tell those that sent rows; hear from those that got some

A box is written anew without asking. Rows: whoever got some has answered, and reads none after
that. Answers: every peer has opened its next trip, and has used those of the last before.
"""

from __future__ import annotations

import torch

from cluster.dist.peer_group import NodeMemory, PeerGroup
from moe.exchange.hops import Trip
from moe.exchange.preposted import check_number
from moe.plan import RowPlan

_ROWS, _ANSWERS = 0, 1


class SharedHop:
    """A hop through memory.

    Args:
        group: the ranks of a node; lower bits of answers go this way.
        memory: of the same ranks in the same order.
        row_bytes: of a row on the way out.
    """

    def __init__(self, group: PeerGroup, memory: NodeMemory, *, row_bytes: int) -> None:
        self.group = group
        self.memory = memory
        self.row_bytes = row_bytes
        self.peers = tuple(peer for peer in range(group.size) if peer != group.rank)
        self.num_trips = 0

    def open(self, rows_TX: torch.Tensor, plan: RowPlan, answer_bytes: int) -> Trip:
        """Write the copies and tell everybody."""
        self.num_trips += 1
        return _SharedTrip(self, rows_TX, plan, answer_bytes)


class _SharedTrip:
    def __init__(
        self, hop: SharedHop, rows_TX: torch.Tensor, plan: RowPlan, answer_bytes: int
    ) -> None:
        self._hop = hop
        self.group = hop.group
        self.sent = list(plan.counts)
        self.received: list[int] = []
        self._bounds = plan.bounds
        self._number = hop.num_trips
        self._answer_bytes = answer_bytes
        num_copies, width = self._bounds[-1], hop.row_bytes
        self._rows = hop.memory.box(_ROWS, num_copies * width).view(num_copies, width)
        self._room = self._rows[:0]
        plan.gather_into(rows_TX, self._rows, 0, num_copies)
        for peer in hop.peers:
            note = (self._bounds[peer] * width, self.sent[peer], self._number)
            hop.memory.tell(peer, _ROWS, note)

    def arrive(self, what: str) -> list[torch.Tensor]:
        """The peers' memory, and one's own."""
        me = self._hop.group.rank
        pieces = []
        for peer in range(self._hop.group.size):
            if peer == me:
                piece = self._rows[self._bounds[me] : self._bounds[me + 1]]
            else:
                piece = self._heard(peer, self._hop.row_bytes, what)
            self.received.append(piece.shape[0])
            pieces.append(piece)
        return pieces

    def room(self) -> torch.Tensor:
        """See `Trip.room`."""
        shape = (sum(self.received), self._answer_bytes)
        self._room = self._hop.memory.box(_ANSWERS, shape[0] * shape[1]).view(shape)
        return self._room

    def give_back(self, what: str) -> list[torch.Tensor]:
        """Tell that the answers are there; the peers' memory, and one's own."""
        hop, me, first = self._hop, self._hop.group.rank, 0
        own = self._room[:0]
        for peer, count in enumerate(self.received):
            if peer == me:
                own = self._room[first : first + count]
            elif count:
                hop.memory.tell(peer, _ANSWERS, (first * self._answer_bytes, count, self._number))
            first += count
        return [
            own if peer == me else self._heard(peer, self._answer_bytes, what)
            for peer, count in enumerate(self.sent)
            if peer == me or count
        ]

    def _heard(self, peer: int, width: int, what: str) -> torch.Tensor:
        """The rows that a peer has told of."""
        memory, (first, count, number) = self._hop.memory.hear(peer, what)
        check_number(peer, number, self._number, what)
        return memory[first : first + count * width].view(count, width)
