"""One hop of rows among a group of peers, there and back: the step all schemes are made of.

A hop is opened with rows and a plan of who gets which, gives the rows that arrived, and later takes
one answer per arrived row back to where that row came from, in the order it was sent. What differs
between hops is how the receiver learns how many rows come, and how they travel: `CountedHop`
exchanges counts first, `SlotHop` (preposted.py) has posted slots, `StreamHop` (stream_hop.py) has
connections of its own, `SharedHop` (shared_hop.py) reads its peers' memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from cluster.dist.peer_group import PeerGroup, Transfer
from moe.plan import RowPlan
from moe.row_moves import Piece, whole

_COUNT_BYTES = 8
_MORE_TAG = 4


class Trip(Protocol):
    """One use of a hop: `arrive`, `room` and `give_back`, once each and in this order."""

    @property
    def group(self) -> PeerGroup:
        """The members."""
        ...

    @property
    def sent(self) -> Sequence[int]:
        """Rows to each member."""
        ...

    @property
    def received(self) -> Sequence[int]:
        """Rows from each member; known once they have arrived."""
        ...

    def arrive(self, what: str) -> list[Piece]:
        """The rows from all members, in member order and in pieces: uint8 (A, row_bytes) in all.

        They may lie in another rank's memory, and are gone after `give_back`.
        """
        ...

    def room(self) -> torch.Tensor:
        """Where the answers to the arrived rows are to be written: uint8 (A, answer_bytes)."""
        ...

    def give_back(self, what: str) -> list[torch.Tensor]:
        """Return what was written; gives one answer per row sent, in the plan's order, in pieces.

        uint8 (R, answer_bytes) in all; gone when the hop is opened again.
        """
        ...


class Hop(Protocol):
    """A way of moving rows among the members of one group."""

    @property
    def group(self) -> PeerGroup:
        """The members."""
        ...

    def open(self, pieces: Sequence[Piece], plan: RowPlan, answer_bytes: int) -> Trip:
        """Begin to send copies of rows to the plan's destinations, the members.

        Every member opens its trips in the same order, with zero rows if it has none.
        """
        ...


class CountedHop:
    """Counts, then rows: two collectives there and one back, whatever the sizes."""

    def __init__(self, group: PeerGroup) -> None:
        self.group = group

    def open(self, pieces: Sequence[Piece], plan: RowPlan, answer_bytes: int) -> Trip:
        """Start the exchange of counts."""
        return _CountedTrip(self.group, whole(pieces), plan, answer_bytes)


class _CountedTrip:
    def __init__(
        self, group: PeerGroup, rows_TX: torch.Tensor, plan: RowPlan, answer_bytes: int
    ) -> None:
        self.group = group
        self.sent = list(plan.counts)
        self.received: list[int] = []
        self._answer_bytes = answer_bytes
        self._room = torch.empty((0, answer_bytes), dtype=torch.uint8)
        self._own_counts = torch.tensor(self.sent, dtype=torch.int64)
        self._their_counts = torch.empty_like(self._own_counts)
        even = [_COUNT_BYTES] * group.size
        self._counting: Transfer = group.all_to_all(
            self._their_counts.view(torch.uint8), self._own_counts.view(torch.uint8), even, even
        )
        self._rows = plan.gather(rows_TX)  # while the counts travel

    def arrive(self, what: str) -> list[Piece]:
        """Wait for the counts, then for the rows."""
        self._counting.wait(f"{what} (counts)")
        self.received = self._their_counts.tolist()
        rows, self._rows = self._rows, self._rows[:0]
        return [self._exchange(rows, self.sent, self.received, what)]

    def room(self) -> torch.Tensor:
        """See `Trip.room`."""
        shape = (sum(self.received), self._answer_bytes)
        self._room = torch.empty(shape, dtype=torch.uint8)
        return self._room

    def give_back(self, what: str) -> list[torch.Tensor]:
        """The same exchange with sides swapped; counts are known."""
        return [self._exchange(self._room, self.received, self.sent, what)]

    def _exchange(
        self, rows: torch.Tensor, sent: Sequence[int], received: Sequence[int], what: str
    ) -> torch.Tensor:
        width = rows.shape[1]
        arrived = torch.empty((sum(received), width), dtype=torch.uint8)
        self.group.all_to_all(
            arrived.view(-1),
            rows.reshape(-1),
            [width * count for count in received],
            [width * count for count in sent],
        ).wait(what)
        return arrived


def swap_more(
    trip: Trip, rows_FX: torch.Tensor, from_F: torch.Tensor, to_G: torch.Tensor, what: str
) -> torch.Tensor:
    """A second message about a few of a trip's answers, between the members concerned alone.

    Both sides have learned from the answers themselves which rows there is more of.

    Args:
        rows_FX: int32; for answers `from_F` (int64, ascending) that this rank has given.
        to_G: int64, ascending; the answers received that more belongs to.

    Returns:
        int32 (G, X).
    """
    group, width = trip.group, rows_FX.shape[1]
    leaving = torch.split(rows_FX, _by_member(from_F, trip.received))
    coming = rows_FX.new_empty((to_G.numel(), width))
    places = torch.split(coming, _by_member(to_G, trip.sent))
    places[group.rank].copy_(leaving[group.rank])
    others = [peer for peer in range(group.size) if peer != group.rank]
    transfers = [
        group.receive(places[peer].view(torch.uint8).view(-1), peer, _MORE_TAG)
        for peer in others
        if places[peer].numel()
    ]
    transfers += [
        group.send(leaving[peer].view(torch.uint8).view(-1), peer, _MORE_TAG)
        for peer in others
        if leaving[peer].numel()
    ]
    for transfer in transfers:
        transfer.wait(f"{what} (lower bits)")
    return coming


def _by_member(index_F: torch.Tensor, counts: Sequence[int]) -> list[int]:
    """How many of some rows, ascending, lie with each member."""
    ends = torch.tensor(counts).cumsum(0)
    below = torch.searchsorted(index_F, ends)
    return below.diff(prepend=below.new_zeros(1)).tolist()
