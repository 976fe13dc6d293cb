"""Partial sums on their way home: packed, returned over a hop, added to the rows they belong to.

Sums travel as integers (`moe/row_sums.py`) and arrive as they left. Those that need more bits,
because outputs of a token's experts lie far apart, send the lower ones in a second message, between
the ranks concerned alone. `bf16` instead rounds each partial sum, between nodes, where it was asked
for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moe.exchange.hops import Hop, Trip, swap_more
from moe.exchange.wire import Combine
from moe.plan import RowPlan
from moe.row_sums import RowSums, TorchRowSums, add_lower_bits, has_more, lower_bits


@dataclass(frozen=True, slots=True)
class ExactAnswers:
    """The way home without a rounding.

    Args:
        dim: elements of a row.
        sums: what packs and adds.
    """

    dim: int
    sums: RowSums

    @property
    def num_bytes(self) -> int:
        """Of a row."""
        return 4 + 4 * self.dim

    def bring_home(
        self, trip: Trip, plan: RowPlan, partial_AD: torch.Tensor, what: str
    ) -> torch.Tensor:
        """For each row of the plan the fp64 sum of its copies' answers, (T, D).

        Args:
            trip: the one that brought the copies.
            plan: what the copies were made by.
            partial_AD: fp64 sums of the copies that arrived here.
        """
        sent = self.sums.pack(partial_AD)
        came = trip.give_back(sent.view(torch.uint8), what).view(torch.int32)
        sums_TD = torch.zeros((plan.num_rows, self.dim), dtype=torch.float64)
        self.sums.add(came, plan.row_R, sums_TD)
        more_A, more_R = has_more(sent), has_more(came)
        if more_A.numel() or more_R.numel():
            lower = lower_bits(sent[more_A], partial_AD[more_A])
            lower = swap_more(trip, lower, more_A, more_R, what)
            add_lower_bits(lower, came[more_R], plan.row_R[more_R], sums_TD)
        return sums_TD


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
        self, trip: Trip, plan: RowPlan, partial_AD: torch.Tensor, what: str
    ) -> torch.Tensor:
        """See `ExactAnswers.bring_home`."""
        sent = partial_AD.to(torch.bfloat16).view(torch.uint8)
        came = trip.give_back(sent, what).view(torch.bfloat16)
        sums_TD = torch.zeros((plan.num_rows, self.dim), dtype=torch.float64)
        return sums_TD.index_add_(0, plan.row_R, came.double())


Answers = ExactAnswers | RoundedAnswers


@dataclass(frozen=True, slots=True)
class Leg:
    """A hop and how its answers come home."""

    hop: Hop
    answers: Answers

    def open(self, rows: torch.Tensor, counts: Sequence[int]) -> Trip:
        """See `Hop.open`."""
        return self.hop.open(rows, counts, self.answers.num_bytes)


def answers_for(dim: int, combine: Combine, sums: RowSums | None = None) -> Answers:
    """What a way home is made with; `sums`: torch's if not given."""
    if combine is Combine.BF16:
        return RoundedAnswers(dim)
    return ExactAnswers(dim, sums or TorchRowSums())
