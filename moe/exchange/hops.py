"""One hop of rows among a group of peers, there and back: the step all schemes are made of.

A hop is opened with the rows for each member, gives the rows that arrived, and later takes one
answer per arrived row back to where that row came from, in the order it was sent. What differs
between hops is how the receiver learns how many rows come: `CountedHop` exchanges counts first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from cluster.dist.peer_group import PeerGroup, Transfer

_COUNT_BYTES = 8


class Trip(Protocol):
    """One use of a hop: `arrive` once, then `give_back` once."""

    def arrive(self, what: str) -> torch.Tensor:
        """The rows from all members, in member order: uint8 (A, row_bytes)."""
        ...

    def give_back(self, answers: torch.Tensor, what: str) -> torch.Tensor:
        """Return one answer per arrived row; gives one per row sent: uint8 (R, answer_bytes)."""
        ...


class Hop(Protocol):
    """A way of moving rows among the members of one group."""

    @property
    def group(self) -> PeerGroup:
        """The members."""
        ...

    def open(self, rows: torch.Tensor, counts: Sequence[int], answer_bytes: int) -> Trip:
        """Begin to send rows (uint8, contiguous), `counts[i]` of them to member `i` in order.

        Every member opens its trips in the same order, with zero rows if it has none.
        """
        ...


class CountedHop:
    """Counts, then rows: two collectives there and one back, whatever the sizes."""

    def __init__(self, group: PeerGroup) -> None:
        self.group = group

    def open(self, rows: torch.Tensor, counts: Sequence[int], answer_bytes: int) -> Trip:
        """Start the exchange of counts."""
        return _CountedTrip(self.group, rows, counts, answer_bytes)


class _CountedTrip:
    def __init__(
        self, group: PeerGroup, rows: torch.Tensor, counts: Sequence[int], answer_bytes: int
    ) -> None:
        self._group = group
        self._rows = rows
        self._sent = list(counts)
        self._answer_bytes = answer_bytes
        self._received: list[int] = []
        self._own_counts = torch.tensor(self._sent, dtype=torch.int64)
        self._their_counts = torch.empty_like(self._own_counts)
        even = [_COUNT_BYTES] * group.size
        self._counting: Transfer = group.all_to_all(
            self._their_counts.view(torch.uint8), self._own_counts.view(torch.uint8), even, even
        )

    def arrive(self, what: str) -> torch.Tensor:
        """Wait for the counts, then for the rows."""
        self._counting.wait(f"{what} (counts)")
        self._received = self._their_counts.tolist()
        rows, self._rows = self._rows, self._rows[:0]
        return self._exchange(rows, self._sent, self._received, what)

    def give_back(self, answers: torch.Tensor, what: str) -> torch.Tensor:
        """The same exchange with sides swapped; counts are known."""
        return self._exchange(answers, self._received, self._sent, what)

    def _exchange(
        self, rows: torch.Tensor, sent: Sequence[int], received: Sequence[int], what: str
    ) -> torch.Tensor:
        width = rows.shape[1]
        arrived = torch.empty((sum(received), width), dtype=torch.uint8)
        self._group.all_to_all(
            arrived.view(-1),
            rows.reshape(-1),
            [width * count for count in received],
            [width * count for count in sent],
        ).wait(what)
        return arrived
