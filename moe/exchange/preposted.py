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

from collections.abc import Sequence

import torch

from cluster.base.errors import InternalError
from cluster.dist.peer_group import PeerGroup, Transfer
from moe.exchange.hops import Trip

_HEADER_BYTES = 16
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
            peer: torch.empty(_HEADER_BYTES + slot_rows * row_bytes, dtype=torch.uint8)
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

    def open(self, rows: torch.Tensor, counts: Sequence[int], answer_bytes: int) -> Trip:
        """Send at once; nobody needs to be asked."""
        self.num_trips += 1
        return _SlotTrip(self, rows, counts, answer_bytes)


class _SlotTrip:
    def __init__(
        self, hop: SlotHop, rows: torch.Tensor, counts: Sequence[int], answer_bytes: int
    ) -> None:
        self._hop = hop
        self.group = hop.group
        self.sent = list(counts)
        self.received: list[int] = []
        self._bounds = _bounds(counts)
        self._number = hop.num_trips
        me = hop.group.rank
        self._own_rows = rows[self._bounds[me] : self._bounds[me + 1]]
        self._sends: list[Transfer] = []
        for peer in hop.peers:
            self._send_rows(peer, rows[self._bounds[peer] : self._bounds[peer + 1]])
        self._answers = torch.empty((sum(counts), answer_bytes), dtype=torch.uint8)
        # Announced long before the answers exist, so they will travel at once.
        self._expected = [
            hop.group.receive(self._part(self._answers, peer).reshape(-1), peer, _ANSWER_TAG)
            for peer in hop.peers
            if counts[peer]
        ]

    def arrive(self, what: str) -> torch.Tensor:
        """Take the rows out of all slots, in member order."""
        hop = self._hop
        taken = {peer: self._take(peer, what) for peer in hop.peers}
        rest = {peer: self._post_overflow(peer, count) for peer, (count, _) in taken.items()}
        parts = []
        for peer in range(hop.group.size):
            if peer == hop.group.rank:
                self.received.append(self._own_rows.shape[0])
                parts.append(self._own_rows)
                continue
            count, fitting = taken[peer]
            self.received.append(count)
            parts.append(fitting)
            if overflow := rest[peer]:
                rows, transfer = overflow
                transfer.wait(f"{what} (second round)")
                parts.append(rows)
        arrived = torch.cat(parts)
        self._end_sends(what)
        return arrived

    def give_back(self, answers: torch.Tensor, what: str) -> torch.Tensor:
        """Send answers, renew the slots, wait for the answers to what was sent."""
        hop = self._hop
        bounds = _bounds(self.received)
        for peer in hop.peers:
            if self.received[peer]:
                part = answers[bounds[peer] : bounds[peer + 1]].reshape(-1)
                self._sends.append(hop.group.send(part, peer, _ANSWER_TAG))
        # After the answers, which are urgent: these are for the next trip.
        hop.post()
        me = hop.group.rank
        self._part(self._answers, me).copy_(answers[bounds[me] : bounds[me + 1]])
        for transfer in self._expected:
            transfer.wait(what)
        self._end_sends(what)
        return self._answers

    def _send_rows(self, peer: int, rows: torch.Tensor) -> None:
        hop = self._hop
        fitting = rows[: hop.slot_rows]
        message = torch.empty(_HEADER_BYTES + fitting.numel(), dtype=torch.uint8)
        message[:_HEADER_BYTES].view(torch.int64).copy_(torch.tensor([rows.shape[0], self._number]))
        message[_HEADER_BYTES:].view(fitting.shape).copy_(fitting)
        self._sends.append(hop.group.send(message, peer, _SLOT_TAG))
        rest = rows[hop.slot_rows :]
        if rest.shape[0]:
            self._sends.append(hop.group.send(rest.reshape(-1), peer, _OVERFLOW_TAG))

    def _take(self, peer: int, what: str) -> tuple[int, torch.Tensor]:
        """How many rows a peer sends, and those in its slot."""
        hop = self._hop
        hop.posted.pop(peer).wait(what)
        slot = hop.slots[peer]
        count, number = slot[:_HEADER_BYTES].view(torch.int64).tolist()
        if number != self._number:
            raise InternalError(
                f"Member {peer} is at trip {number} and this rank at {self._number} ({what}).",
                "All ranks must make the same calls in the same order.",
            )
        fitting = min(count, hop.slot_rows)
        rows = slot[_HEADER_BYTES : _HEADER_BYTES + fitting * hop.row_bytes]
        return count, rows.view(fitting, hop.row_bytes)

    def _post_overflow(self, peer: int, count: int) -> tuple[torch.Tensor, Transfer] | None:
        hop = self._hop
        if count <= hop.slot_rows:
            return None
        hop.num_overflows += 1
        rest = torch.empty((count - hop.slot_rows, hop.row_bytes), dtype=torch.uint8)
        return rest, hop.group.receive(rest.view(-1), peer, _OVERFLOW_TAG)

    def _part(self, rows: torch.Tensor, peer: int) -> torch.Tensor:
        return rows[self._bounds[peer] : self._bounds[peer + 1]]

    def _end_sends(self, what: str) -> None:
        for transfer in self._sends:
            transfer.wait(what)
        self._sends.clear()


def _bounds(counts: Sequence[int]) -> list[int]:
    bounds = [0]
    for count in counts:
        bounds.append(bounds[-1] + count)
    return bounds
