"""The exchange of a group of one: rows stay where they are and are only put in order."""

from __future__ import annotations

import torch

from moe.exchange.base import Arrivals


class LocalExchange:
    """Implements `Exchange` without peers.

    Args:
        num_local: experts on this rank; physical experts are 0 ... num_local - 1.
    """

    name = "local"

    def __init__(self, num_local: int) -> None:
        self._num_local = num_local

    def dispatch(
        self, hidden_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> LocalPending:
        """See `Exchange.dispatch`; the rows are not copied."""
        pair_expert = expert_TK.flatten()
        # Stable: pairs of one expert stay in the order of their rows.
        order_M = pair_expert.argsort(stable=True)
        counts_L = torch.bincount(pair_expert, minlength=self._num_local)
        offsets_L1 = torch.zeros(self._num_local + 1, dtype=torch.int64)
        torch.cumsum(counts_L.cpu(), 0, out=offsets_L1[1:])
        return LocalPending(
            Arrivals(
                hidden_AD=hidden_TD,
                row_M=order_M // max(1, expert_TK.shape[1]),
                weight_M=weight_TK.flatten()[order_M],
                offsets_L1=offsets_L1,
            )
        )

    def combine(self, partial_AD: torch.Tensor, arrivals: Arrivals) -> torch.Tensor:
        """The sums are whole already."""
        return partial_AD


class LocalPending:
    """Implements `Pending` for rows that did not travel."""

    def __init__(self, arrivals: Arrivals) -> None:
        self._arrivals = arrivals

    def wait(self) -> Arrivals:
        """At once."""
        return self._arrivals
