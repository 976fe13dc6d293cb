"""Which rows go where, worked out once on the way out and used again on the way back.

Pure and immutable. A row goes at most once to a destination, however many of its experts are there:
that is where grouping by node saves bytes. Every copy's answer is later added to the row it was
made from, `row_R`.

Shapes: T rows, R copies of rows, W destinations, K experts per row, M (row, local expert) pairs.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

NOWHERE = -1
"""An expert or destination that is none (padding, dropped, or not here)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPlan:
    """Copies of rows, sorted by destination and then by row."""

    num_rows: int
    row_R: torch.Tensor
    """int64: the row each copy is made from; ascending within a destination."""
    counts: tuple[int, ...]
    """Copies for each destination."""

    @classmethod
    def build(cls, destination_TK: torch.Tensor, num_destinations: int) -> RowPlan:
        """From the destination of each of a row's experts; `NOWHERE` entries go nowhere."""
        num_rows = destination_TK.shape[0]
        # One column more takes what goes nowhere, and is cut off.
        goes = torch.zeros((num_rows, num_destinations + 1), dtype=torch.bool)
        goes.scatter_(1, destination_TK.remainder(num_destinations + 1), True)
        goes_WT = goes[:, :num_destinations].t()
        return cls(
            num_rows=num_rows,
            row_R=goes_WT.nonzero()[:, 1],
            counts=tuple(goes_WT.sum(dim=1).tolist()),
        )

    @property
    def num_copies(self) -> int:
        """Copies in all."""
        return self.row_R.numel()

    @property
    def bounds(self) -> list[int]:
        """Where each destination's copies begin, and the end."""
        return [0, *itertools.accumulate(self.counts)]

    def gather(self, rows_TX: torch.Tensor) -> torch.Tensor:
        """The copies, in the plan's order."""
        return rows_TX.index_select(0, self.row_R)

    def gather_into(self, rows_TX: torch.Tensor, into: torch.Tensor, first: int, end: int) -> None:
        """Copies `first` up to `end`, written to contiguous (end - first, X) memory."""
        torch.index_select(rows_TX, 0, self.row_R[first:end], out=into)

    def inverse(self) -> torch.Tensor:
        """int64 (T, W): where in the plan's order the copy of a row for a destination stands."""
        position_TW = torch.full((self.num_rows, len(self.counts)), NOWHERE, dtype=torch.int64)
        destination_R = torch.arange(len(self.counts)).repeat_interleave(torch.tensor(self.counts))
        position_TW[self.row_R, destination_R] = torch.arange(self.num_copies)
        return position_TW


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Rows and the local experts they visit, sorted by expert and then by row.

    Expert `e` owns `pairs[offsets_L1[e] : offsets_L1[e + 1]]`.
    """

    row_M: torch.Tensor
    """int64."""
    weight_M: torch.Tensor
    """fp32 gate weights."""
    offsets_L1: torch.Tensor
    """int64 on the CPU; L + 1 entries."""

    @classmethod
    def build(cls, slot_AK: torch.Tensor, weight_AK: torch.Tensor, num_local: int) -> Pairs:
        """Keep the local experts `0 .. num_local - 1`; the others are elsewhere."""
        here_AK = (slot_AK >= 0) & (slot_AK < num_local)
        row_M, choice_M = here_AK.nonzero(as_tuple=True)
        local_M = slot_AK[row_M, choice_M]
        order = torch.argsort(local_M, stable=True)
        offsets = torch.zeros(num_local + 1, dtype=torch.int64)
        torch.cumsum(torch.bincount(local_M, minlength=num_local).cpu(), 0, out=offsets[1:])
        return cls(
            row_M=row_M[order],
            weight_M=weight_AK[row_M, choice_M][order],
            offsets_L1=offsets,
        )
