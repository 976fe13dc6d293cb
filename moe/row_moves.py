"""What a rank does with rows besides their sums: who gets which, and taking apart what came.

Small work on small tensors, done several times a layer: its price is the calls, not the bytes, and
caches are cold when it runs. The compiled way is one call each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

from moe.plan import RowPlan
from moe.row_sums import RowSums, TorchRowSums

if TYPE_CHECKING:
    from moe.exchange.wire import WireFormat


@dataclass(frozen=True, slots=True)
class Picked:
    """Some rows among others, left where they lie."""

    rows_NX: torch.Tensor
    row_A: torch.Tensor
    """int64, contiguous; which, in this order."""

    def taken(self) -> torch.Tensor:
        """A copy of them."""
        return self.rows_NX.index_select(0, self.row_A)


Piece = torch.Tensor | Picked
"""Packed rows: all of a contiguous tensor, or some."""


def whole(pieces: Sequence[Piece]) -> torch.Tensor:
    """Rows in one tensor; copied unless they are in one already."""
    tensors = [piece.taken() if isinstance(piece, Picked) else piece for piece in pieces]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


@dataclass(frozen=True, slots=True)
class SplitRows:
    """Rows that came, taken apart."""

    hidden_AD: torch.Tensor
    expert_AK: torch.Tensor
    """int64 physical experts."""
    weight_AK: torch.Tensor
    """fp32."""


class RowMoves(Protocol):
    """Plans and takes apart; compiled or in torch, to the same result."""

    def plan(self, expert_TK: torch.Tensor, member_S: torch.Tensor, num_members: int) -> RowPlan:
        """The copies of rows for each member.

        Args:
            expert_TK: int64 physical experts of each row, or `NOWHERE`.
            member_S: int64; the member that a physical expert is reached through, or `NOWHERE`;
                one entry more at the end, for what is nowhere.
        """
        ...

    def experts(self, format: WireFormat, pieces: Sequence[Piece]) -> torch.Tensor:
        """Physical experts of packed rows in pieces, int64 (A, K)."""
        ...

    def split(self, format: WireFormat, pieces: Sequence[Piece]) -> SplitRows:
        """All that is in packed rows in pieces, copied."""
        ...


class TorchRowMoves:
    """`RowMoves` in torch: every platform and format, and what others are tested against."""

    def plan(self, expert_TK: torch.Tensor, member_S: torch.Tensor, num_members: int) -> RowPlan:
        """See `RowMoves.plan`."""
        return RowPlan.build(member_S[expert_TK], num_members)

    def experts(self, format: WireFormat, pieces: Sequence[Piece]) -> torch.Tensor:
        """See `RowMoves.experts`."""
        return format.experts(format.routing([whole(pieces)]))

    def split(self, format: WireFormat, pieces: Sequence[Piece]) -> SplitRows:
        """See `RowMoves.split`."""
        rows = [whole(pieces)]
        routing = format.routing(rows)
        return SplitRows(format.hidden(rows), format.experts(routing), format.weights(routing))


@dataclass(frozen=True, slots=True, kw_only=True)
class RowWork:
    """All that a rank does with rows on their way."""

    moves: RowMoves = field(default_factory=TorchRowMoves)
    sums: RowSums = field(default_factory=TorchRowSums)
