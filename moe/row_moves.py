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

    def experts(self, format: WireFormat, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        """Physical experts of packed rows in pieces, int64 (A, K)."""
        ...

    def split(self, format: WireFormat, pieces: Sequence[torch.Tensor]) -> SplitRows:
        """All that is in packed rows in pieces, copied."""
        ...


class TorchRowMoves:
    """`RowMoves` in torch: every platform and format, and what others are tested against."""

    def plan(self, expert_TK: torch.Tensor, member_S: torch.Tensor, num_members: int) -> RowPlan:
        """See `RowMoves.plan`."""
        return RowPlan.build(member_S[expert_TK], num_members)

    def experts(self, format: WireFormat, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        """See `RowMoves.experts`."""
        return format.experts(format.routing(pieces))

    def split(self, format: WireFormat, pieces: Sequence[torch.Tensor]) -> SplitRows:
        """See `RowMoves.split`."""
        routing = format.routing(pieces)
        return SplitRows(format.hidden(pieces), format.experts(routing), format.weights(routing))


@dataclass(frozen=True, slots=True, kw_only=True)
class RowWork:
    """All that a rank does with rows on their way."""

    moves: RowMoves = field(default_factory=TorchRowMoves)
    sums: RowSums = field(default_factory=TorchRowSums)
