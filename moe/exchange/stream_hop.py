"""A hop along a rail over connections of its own: one one-way delay each way, whatever the sizes.

A message says how many rows it brings, so there is no exchange of counts, no slot and no second
round. Everybody begins with the next member and hears from the one before first: no way in is
everybody's first, and what is waited for is what was sent first.

    open        send rows to every other member, also that there are none
    arrive      hear from every other member
    give_back   answer those that sent rows; hear from those that got some
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cluster.base.errors import InternalError
from cluster.dist.peer_group import Note, PeerGroup, Streams
from moe.exchange.hops import Trip
from moe.exchange.preposted import check_number
from moe.plan import RowPlan
from moe.row_moves import Piece, whole

_ROWS, _ANSWERS = 0, 1


class StreamHop:
    """A hop over streams.

    Args:
        group: the members; lower bits of answers go this way.
        streams: between the same members in the same order.
        row_bytes: of a row on the way out.
    """

    def __init__(self, group: PeerGroup, streams: Streams, *, row_bytes: int) -> None:
        self.group = group
        self.streams = streams
        self.row_bytes = row_bytes
        steps = range(1, group.size)
        self.targets = tuple((group.rank + step) % group.size for step in steps)
        self.sources = tuple((group.rank - step) % group.size for step in steps)
        self.num_trips = 0

    def open(self, pieces: Sequence[Piece], plan: RowPlan, answer_bytes: int) -> Trip:
        """Send at once; nobody needs to be asked."""
        self.num_trips += 1
        return _StreamTrip(self, whole(pieces), plan, answer_bytes)


class _StreamTrip:
    def __init__(
        self, hop: StreamHop, rows_TX: torch.Tensor, plan: RowPlan, answer_bytes: int
    ) -> None:
        self._hop = hop
        self.group = hop.group
        self.sent = list(plan.counts)
        self.received = [0] * hop.group.size
        self._number = hop.num_trips
        self._answer_bytes = answer_bytes
        self._room = torch.empty((0, answer_bytes), dtype=torch.uint8)
        leaving = torch.split(plan.gather(rows_TX), self.sent)
        for peer in hop.targets:
            note = (_ROWS, self.sent[peer], self._number)
            hop.streams.send(peer, note, leaving[peer].view(-1))
        self._own_rows = leaving[hop.group.rank]

    def arrive(self, what: str) -> list[Piece]:
        """Read every member's message."""
        hop, me = self._hop, self._hop.group.rank
        pieces = {me: self._own_rows}
        for peer in hop.sources:

            def place(note: Note, peer: int = peer) -> torch.Tensor:
                self._check(peer, note, _ROWS, what)
                pieces[peer] = torch.empty((note[1], hop.row_bytes), dtype=torch.uint8)
                return pieces[peer].view(-1)

            hop.streams.receive(peer, place, what)
        ordered = [pieces[peer] for peer in range(hop.group.size)]
        self.received = [piece.shape[0] for piece in ordered]
        return list(ordered)

    def room(self) -> torch.Tensor:
        """See `Trip.room`."""
        self._room = self._room.new_empty((sum(self.received), self._answer_bytes))
        return self._room

    def give_back(self, what: str) -> list[torch.Tensor]:
        """Answer; the answers to what was sent, one's own among them."""
        hop, me = self._hop, self._hop.group.rank
        leaving = list(torch.split(self._room, self.received))
        for peer in hop.targets:
            if count := self.received[peer]:
                note = (_ANSWERS, count, self._number)
                hop.streams.send(peer, note, leaving[peer].view(-1))
        coming = list(
            torch.split(self._room.new_empty((sum(self.sent), self._answer_bytes)), self.sent)
        )
        coming[me] = leaving[me]
        for peer in hop.sources:
            if self.sent[peer]:

                def place(note: Note, peer: int = peer) -> torch.Tensor:
                    self._check(peer, note, _ANSWERS, what)
                    return coming[peer].view(-1)

                hop.streams.receive(peer, place, what)
        return coming

    def _check(self, peer: int, note: Note, kind: int, what: str) -> None:
        theirs, _, number = note
        check_number(peer, number, self._number, what)
        if theirs != kind:
            raise InternalError(f"Member {peer} sent a message of kind {theirs} in {what}.")
