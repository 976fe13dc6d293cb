"""Partial sums on their way home: packed, returned over a hop, added to the rows they belong to.

Sums travel as integers (`moe/row_sums.py`) and arrive as they left. A forwarder adds and packs them
again in one pass, and the source adds and rounds in one. Those that need more bits,
because outputs of a token's experts lie far apart, send the lower ones in a second message, between
the ranks concerned alone. `bf16` instead rounds each partial sum, between nodes, where it was asked
for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from moe.exchange.hops import Hop, Trip, swap_more
from moe.exchange.wire import Combine
from moe.plan import RowPlan
from moe.row_moves import Piece
from moe.row_sums import RowSums, TorchRowSums, add_lower_bits, has_more, lower_bits


class Returned(Protocol):
    """Answers that have come home, to be added up once, at once."""

    def sums(self) -> torch.Tensor:
        """For each row of the plan the fp64 sum of its copies' answers, (T, D)."""
        ...

    def rounded(self) -> torch.Tensor:
        """The same in fp32."""
        ...


@dataclass(frozen=True, slots=True)
class ExactAnswers:
    """The way home without a rounding.

    Args:
        dim: elements of a row.
        row_sums: what packs and adds.
    """

    dim: int
    row_sums: RowSums

    @property
    def num_bytes(self) -> int:
        """Of a row."""
        return 4 + 4 * self.dim

    def bring_home(
        self, trip: Trip, plan: RowPlan, partial_AD: torch.Tensor | Returned, what: str
    ) -> ReturnedExactly:
        """Return partial sums over a hop.

        Args:
            trip: the one that brought the copies.
            plan: what the copies were made by.
            partial_AD: fp64 sums of the copies that arrived here, or what came home from a hop
                further on and is passed on from its packed form.
        """
        sent_AX = trip.room().view(torch.int32)
        if isinstance(partial_AD, ReturnedExactly):
            lacking_AD = partial_AD.pass_on(sent_AX)
        else:
            sums_AD = _sums_of(partial_AD)
            lacking_AD = sums_AD if self.row_sums.pack(sums_AD, sent_AX) else None
        pieces = [piece.view(torch.int32) for piece in trip.give_back(what)]
        return ReturnedExactly(self.row_sums, trip, plan, sent_AX, lacking_AD, pieces, what)


@dataclass(frozen=True, slots=True)
class ReturnedExactly:
    """Implements `Returned` for packed sums, in one pass unless some rows have lower bits."""

    row_sums: RowSums
    trip: Trip
    plan: RowPlan
    sent_AX: torch.Tensor
    lacking_AD: torch.Tensor | None
    """fp64 sums given, if the lower bits of some have to follow."""
    pieces: list[torch.Tensor]
    what: str

    def sums(self) -> torch.Tensor:
        """See `Returned.sums`; lower bits follow between the ranks concerned."""
        came_RX = torch.cat(self.pieces)
        sums_TD = torch.zeros((self.plan.num_rows, came_RX.shape[1] - 1), dtype=torch.float64)
        self.row_sums.add(came_RX, self.plan.row_R, sums_TD)
        more_A, more_R = has_more(self.sent_AX), has_more(came_RX)
        if more_A.numel() or more_R.numel():
            lower = came_RX.new_empty((0, sums_TD.shape[1]))
            if self.lacking_AD is not None:
                lower = lower_bits(self.sent_AX[more_A], self.lacking_AD[more_A])
            lower = swap_more(self.trip, lower, more_A, more_R, self.what)
            add_lower_bits(lower, came_RX[more_R], self.plan.row_R[more_R], sums_TD)
        return sums_TD

    def rounded(self) -> torch.Tensor:
        """See `Returned.rounded`."""
        total_TD = torch.empty((self.plan.num_rows, self.sent_AX.shape[1] - 1))
        if self.lacking_AD is None and self.row_sums.total(self.pieces, self.plan.row_R, total_TD):
            return total_TD
        return self.sums().float()

    def pass_on(self, into_TX: torch.Tensor) -> torch.Tensor | None:
        """Write the packed sums; the fp64 sums if the lower bits of some have to follow."""
        if self.lacking_AD is None and self.row_sums.join(self.pieces, self.plan.row_R, into_TX):
            return None
        sums_TD = self.sums()
        return sums_TD if self.row_sums.pack(sums_TD, into_TX) else None


@dataclass(frozen=True, slots=True)
class RoundedAnswers:
    """The way home in bf16: half the bytes, and each partial sum is rounded.

    Args:
        dim: elements of a row.
    """

    dim: int

    @property
    def num_bytes(self) -> int:
        """Of a row."""
        return 2 * self.dim

    def bring_home(
        self, trip: Trip, plan: RowPlan, partial_AD: torch.Tensor | Returned, what: str
    ) -> ReturnedRounded:
        """See `ExactAnswers.bring_home`."""
        trip.room().view(torch.bfloat16).copy_(_sums_of(partial_AD))
        pieces = [piece.view(torch.bfloat16) for piece in trip.give_back(what)]
        return ReturnedRounded(plan, pieces)


@dataclass(frozen=True, slots=True)
class ReturnedRounded:
    """Implements `Returned` for bf16."""

    plan: RowPlan
    pieces: list[torch.Tensor]

    def sums(self) -> torch.Tensor:
        """See `Returned.sums`."""
        came_RD = torch.cat(self.pieces).double()
        sums_TD = came_RD.new_zeros((self.plan.num_rows, came_RD.shape[1]))
        return sums_TD.index_add_(0, self.plan.row_R, came_RD)

    def rounded(self) -> torch.Tensor:
        """See `Returned.rounded`."""
        return self.sums().float()


def _sums_of(partial_AD: torch.Tensor | Returned) -> torch.Tensor:
    return partial_AD if isinstance(partial_AD, torch.Tensor) else partial_AD.sums()


Answers = ExactAnswers | RoundedAnswers


@dataclass(frozen=True, slots=True)
class Leg:
    """A hop and how its answers come home."""

    hop: Hop
    answers: Answers

    def open(self, pieces: Sequence[Piece], plan: RowPlan) -> Trip:
        """See `Hop.open`."""
        return self.hop.open(pieces, plan, self.answers.num_bytes)


def answers_for(dim: int, combine: Combine, sums: RowSums | None = None) -> Answers:
    """What a way home is made with; `sums`: torch's if not given."""
    if combine is Combine.BF16:
        return RoundedAnswers(dim)
    return ExactAnswers(dim, sums or TorchRowSums())
