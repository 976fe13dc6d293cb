"""The exchange of a group of one: rows stay where they are."""

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
        return LocalPending(
            Arrivals(
                hidden_AD=hidden_TD,
                slot_AK=expert_TK,
                weight_AK=weight_TK,
                num_local=self._num_local,
            )
        )

    def combine(self, partial_AD: torch.Tensor, arrivals: Arrivals) -> torch.Tensor:
        """The sums are whole already; they are rounded to fp32."""
        return partial_AD.float()


class LocalPending:
    """Implements `Pending` for rows that did not travel."""

    def __init__(self, arrivals: Arrivals) -> None:
        self._arrivals = arrivals

    def wait(self) -> Arrivals:
        """At once."""
        return self._arrivals
