"""A hop among the ranks of one node, through memory that they read from each other.

Every rank has two boxes: its rows once each, with a list of who gets which, and the answers that
it gives, in the order of the rows that came. Who is told where its part begins reads it in place,
so a row that several ranks want is written once, and none is too many.

    rows:     | row 0 | row 1 | ... | row numbers for rank 0: int64 | for rank 1 | ... |
    answers:  | to rows of rank 0 | of rank 1 | ... |

    open        write both; tell every peer (first byte, rows, trip), also that there are none
    arrive      hear from every peer
    room        the box of answers
    give_back   tell those that sent rows; hear from those that got some

A box is written anew without asking. Rows: whoever got some has answered, and reads none after
that. Answers: every peer has opened its next trip, and has used those of the last before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cluster.dist.peer_group import NodeMemory, PeerGroup
from moe.exchange.hops import Trip
from moe.exchange.preposted import check_number
from moe.plan import RowPlan
from moe.row_moves import Picked, Piece, whole

_ROWS, _ANSWERS = 0, 1
_NUMBER_BYTES = 8


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

    def open(self, pieces: Sequence[Piece], plan: RowPlan, answer_bytes: int) -> Trip:
        """Write the rows and tell everybody which are theirs."""
        self.num_trips += 1
        return _SharedTrip(self, pieces, plan, answer_bytes)


class _SharedTrip:
    def __init__(
        self, hop: SharedHop, pieces: Sequence[Piece], plan: RowPlan, answer_bytes: int
    ) -> None:
        self._hop = hop
        self.group = hop.group
        self.sent = list(plan.counts)
        self.received: list[int] = []
        self._bounds = plan.bounds
        self._number = hop.num_trips
        self._answer_bytes = answer_bytes
        self._own = self._write(pieces, plan)
        self._room = torch.empty((0, answer_bytes), dtype=torch.uint8)

    def _write(self, pieces: Sequence[Piece], plan: RowPlan) -> Picked:
        """Fill the box and tell the peers; what this rank itself gets."""
        hop, me, width = self._hop, self._hop.group.rank, self._hop.row_bytes
        num_bytes = plan.num_rows * width
        lists_at = -(-num_bytes // _NUMBER_BYTES) * _NUMBER_BYTES
        box = hop.memory.box(_ROWS, lists_at + plan.num_copies * _NUMBER_BYTES)
        rows_TX = box[:num_bytes].view(plan.num_rows, width)
        torch.cat([whole([piece]) for piece in pieces], out=rows_TX)
        row_R = box[lists_at:].view(torch.int64)
        row_R.copy_(plan.row_R)
        for peer in hop.peers:
            first = lists_at + self._bounds[peer] * _NUMBER_BYTES
            hop.memory.tell(peer, _ROWS, (first, self.sent[peer], self._number))
        return Picked(rows_TX, row_R[self._bounds[me] : self._bounds[me + 1]])

    def arrive(self, what: str) -> list[Piece]:
        """The peers' memory, and one's own."""
        hop, width = self._hop, self._hop.row_bytes
        pieces: list[Piece] = []
        for peer in range(hop.group.size):
            piece = self._own
            if peer != hop.group.rank:
                memory, first, count = self._heard(peer, what)
                row_A = memory[first : first + count * _NUMBER_BYTES].view(torch.int64)
                piece = Picked(memory[: first // width * width].view(-1, width), row_A)
            self.received.append(piece.row_A.numel())
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
            own if peer == me else self._answers(peer, what)
            for peer, count in enumerate(self.sent)
            if peer == me or count
        ]

    def _answers(self, peer: int, what: str) -> torch.Tensor:
        memory, first, count = self._heard(peer, what)
        width = self._answer_bytes
        return memory[first : first + count * width].view(count, width)

    def _heard(self, peer: int, what: str) -> tuple[torch.Tensor, int, int]:
        """A peer's box, where in it what it has told of begins, and how much there is."""
        memory, (first, count, number) = self._hop.memory.hear(peer, what)
        check_number(peer, number, self._number, what)
        return memory, first, count
