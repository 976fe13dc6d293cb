"""Rows into slots that their receiver posted one exchange ahead: one one-way delay each way.

gloo sends once it knows of the receive, so a receive posted before the sender has anything to send
saves one delay, and a count in the message saves the exchange of counts (two more).

    slot of one peer:   | rows in all: int64 | number of the trip: int64 | up to `slot_rows` rows |

    open        send header + rows to every peer; post the receives of the answers (sizes known)
    arrive      wait for every peer's slot; fetch what did not fit (below); pass the rows on
    give_back   send answers; post the slots of the next trip; wait for the answers

A slot is only as large as its message is on the wire: gloo lets a message be shorter than its
receive. Rows that do not fit follow in a second message of exact size, which the header announces;
that one costs a handshake, and nothing is ever dropped.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch

from cluster.base.errors import InternalError
from cluster.dist.peer_group import PeerGroup, Transfer
from moe.exchange.hops import Trip
from moe.plan import RowPlan
from moe.row_moves import Piece, whole

_HEADER = struct.Struct("=2q")
"""Rows in all, number of the trip."""
_SLOT_TAG, _OVERFLOW_TAG, _ANSWER_TAG = 1, 2, 3


class SlotHop:
    """A hop with a slot from every other member, kept posted while it lives.

    Args:
        group: the members.
        row_bytes: of a row on the way out.
        slot_rows: rows that fit without a second message.
    """

    def __init__(self, group: PeerGroup, *, row_bytes: int, slot_rows: int) -> None:
        self.group = group
        self.row_bytes = row_bytes
        self.slot_rows = slot_rows
        self.peers = tuple(peer for peer in range(group.size) if peer != group.rank)
        self.slots = {
            peer: torch.empty(_HEADER.size + slot_rows * row_bytes, dtype=torch.uint8)
            for peer in self.peers
        }
        self.posted: dict[int, Transfer] = {}
        self.num_trips = 0
        self.num_overflows = 0
        """Messages from peers that needed a second round."""
        self.post()

    def post(self) -> None:
        """Post every peer's slot; the former message must have been taken out."""
        for peer in self.peers:
            self.posted[peer] = self.group.receive(self.slots[peer], peer, _SLOT_TAG)

    def open(self, pieces: Sequence[Piece], plan: RowPlan, answer_bytes: int) -> Trip:
        """Send at once; nobody needs to be asked."""
        self.num_trips += 1
        return _SlotTrip(self, whole(pieces), plan, answer_bytes)


class _SlotTrip:
    def __init__(
        self, hop: SlotHop, rows_TX: torch.Tensor, plan: RowPlan, answer_bytes: int
    ) -> None:
        self._hop = hop
        self.group = hop.group
        self.sent = list(plan.counts)
        self.received: list[int] = []
        self._bounds = plan.bounds
        self._number = hop.num_trips
        self._answer_bytes = answer_bytes
        self._room = torch.empty((0, answer_bytes), dtype=torch.uint8)
        self._sends: list[Transfer] = []
        for peer in hop.peers:
            self._send_rows(peer, rows_TX, plan)
        me = hop.group.rank
        self._own_rows = rows_TX.new_empty((plan.counts[me], hop.row_bytes))
        plan.gather_into(rows_TX, self._own_rows, self._bounds[me], self._bounds[me + 1])
        self._answers = {
            peer: torch.empty((plan.counts[peer], answer_bytes), dtype=torch.uint8)
            for peer in hop.peers
        }
        # Announced long before the answers exist, so they will travel at once.
        self._expected = [
            hop.group.receive(self._answers[peer].view(-1), peer, _ANSWER_TAG)
            for peer in hop.peers
            if plan.counts[peer]
        ]

    def arrive(self, what: str) -> list[Piece]:
        """Take the rows out of all slots, in member order."""
        hop = self._hop
        taken = {peer: self._take(peer, what) for peer in hop.peers}
        rest = {peer: self._post_overflow(peer, count) for peer, (count, _) in taken.items()}
        pieces: list[Piece] = []
        for peer in range(hop.group.size):
            if peer == hop.group.rank:
                self.received.append(self._own_rows.shape[0])
                pieces.append(self._own_rows)
                continue
            count, fitting = taken[peer]
            self.received.append(count)
            pieces.append(fitting)
            if overflow := rest[peer]:
                rows, transfer = overflow
                transfer.wait(f"{what} (second round)")
                pieces.append(rows)
        self._end_sends(what)
        return pieces

    def room(self) -> torch.Tensor:
        """See `Trip.room`."""
        self._room = self._room.new_empty((sum(self.received), self._answer_bytes))
        return self._room

    def give_back(self, what: str) -> list[torch.Tensor]:
        """Send answers, renew the slots, wait for the answers to what was sent."""
        hop = self._hop
        parts = torch.split(self._room, self.received)
        for peer in hop.peers:
            if self.received[peer]:
                self._sends.append(hop.group.send(parts[peer].view(-1), peer, _ANSWER_TAG))
        # After the answers, which are urgent: these are for the next trip.
        hop.post()
        for transfer in self._expected:
            transfer.wait(what)
        self._end_sends(what)
        me = hop.group.rank
        return [parts[me] if peer == me else self._answers[peer] for peer in range(hop.group.size)]

    def _send_rows(self, peer: int, rows_TX: torch.Tensor, plan: RowPlan) -> None:
        hop, width = self._hop, self._hop.row_bytes
        first, end = self._bounds[peer], self._bounds[peer + 1]
        fitting = min(end - first, hop.slot_rows)
        message = torch.empty(_HEADER.size + fitting * width, dtype=torch.uint8)
        _HEADER.pack_into(message.numpy().data, 0, end - first, self._number)
        rows = message[_HEADER.size :].view(fitting, width)
        plan.gather_into(rows_TX, rows, first, first + fitting)
        self._sends.append(hop.group.send(message, peer, _SLOT_TAG))
        if end - first > fitting:
            rest = message.new_empty((end - first - fitting, width))
            plan.gather_into(rows_TX, rest, first + fitting, end)
            self._sends.append(hop.group.send(rest.view(-1), peer, _OVERFLOW_TAG))

    def _take(self, peer: int, what: str) -> tuple[int, torch.Tensor]:
        """How many rows a peer sends, and those in its slot."""
        hop = self._hop
        hop.posted.pop(peer).wait(what)
        slot = hop.slots[peer]
        count, number = _HEADER.unpack_from(slot.numpy().data)
        check_number(peer, number, self._number, what)
        fitting = min(count, hop.slot_rows)
        rows = slot[_HEADER.size : _HEADER.size + fitting * hop.row_bytes]
        return count, rows.view(fitting, hop.row_bytes)

    def _post_overflow(self, peer: int, count: int) -> tuple[torch.Tensor, Transfer] | None:
        hop = self._hop
        if count <= hop.slot_rows:
            return None
        hop.num_overflows += 1
        rest = torch.empty((count - hop.slot_rows, hop.row_bytes), dtype=torch.uint8)
        return rest, hop.group.receive(rest.view(-1), peer, _OVERFLOW_TAG)

    def _end_sends(self, what: str) -> None:
        for transfer in self._sends:
            transfer.wait(what)
        self._sends.clear()


def check_number(peer: int, theirs: int, own: int, what: str) -> None:
    """Refuse a message of another trip.

    Raises:
        InternalError: the ranks have not made the same calls.
    """
    if theirs != own:
        raise InternalError(
            f"Member {peer} is at trip {theirs} and this rank at {own} ({what}).",
            "All ranks must make the same calls in the same order.",
        )
