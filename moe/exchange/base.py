"""The contract between a mixture block and whatever moves tokens to experts and back.

A block routes its own rows, hands them to `dispatch`, computes with the rows that arrived for its
local experts, and hands one partial sum per arrived row to `combine`. Everything an exchange needs
on the way back is in the `Arrivals` it made on the way there: a plan is built once and reused.

Every rank of the group makes the same calls in the same order, with zero rows if it has none.

Shapes: T own rows, A arrived rows (one per token and rank, however many local experts it visits),
M routed pairs (arrived row, local expert), K experts per token, L local experts, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from moe.plan import Pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """The rows that reached this rank, and which of its experts each of them visits."""

    hidden_AD: torch.Tensor
    slot_AK: torch.Tensor
    """int64: local experts, distinct within a row; what is not 0 ... L - 1 is elsewhere."""
    weight_AK: torch.Tensor
    """fp32 gate weights."""
    num_local: int
    """Local experts, L."""
    ticket: Any = None
    """What the exchange that made it needs for `combine`; nobody else looks inside."""

    def pairs(self) -> Pairs:
        """Rows with the local experts they visit, sorted by expert; worked out anew."""
        return Pairs.build(self.slot_AK, self.weight_AK, self.num_local)


class Pending(Protocol):
    """A dispatch on its way; work between start and `wait` is overlapped with it."""

    def wait(self) -> Arrivals:
        """The arrived rows.

        Raises:
            CollectiveTimeoutError: a peer is late; names rank, node and operation.
            WorkerDiedError: a peer is gone.
        """
        ...


class Exchange(Protocol):
    """One way of moving tokens among the ranks of an expert-parallel group."""

    @property
    def name(self) -> str:
        """local, flat, hierarchical or preposted."""
        ...

    def dispatch(
        self, hidden_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> Pending:
        """Send each row to the ranks that hold its experts.

        Args:
            hidden_TD: own rows; T may be 0.
            expert_TK: int64 physical experts of each row, distinct within a row.
            weight_TK: fp32 gate weights.
        """
        ...

    def combine(self, partial_AD: torch.Tensor, arrivals: Arrivals) -> torch.Tensor:
        """Bring the partial sums home: (T, D) fp32, in the order of the rows dispatched.

        The bits are the same wherever the experts are, unless a lossy format was asked for.

        Args:
            partial_AD: fp64; for each arrived row the sum over its local experts of settled
                rows (`moe.exact_sums`).
        """
        ...
