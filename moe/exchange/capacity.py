"""A bound on what one rank sends to an expert; only where it is asked for, because it drops work.

Batch-priority routing (V-MoE, arXiv 2106.05974, section 4.1): rows with the greatest gate weight
are served first, so what is dropped is what mattered least. Dropped pairs are counted. Everything
else in this package is dropless.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from cluster.base.errors import ConfigError
from moe.exchange.base import Arrivals, Exchange, Pending
from moe.plan import NOWHERE


def keep_within(expert_TK: torch.Tensor, weight_TK: torch.Tensor, capacity: int) -> torch.Tensor:
    """The experts, all but the `capacity` heaviest pairs of each replaced by `NOWHERE`."""
    pair_expert = expert_TK.flatten()
    by_weight = torch.argsort(weight_TK.flatten(), descending=True, stable=True)
    order = by_weight[torch.argsort(pair_expert[by_weight], stable=True)]
    ordered = pair_expert[order]
    begins = torch.searchsorted(ordered, ordered)
    place = torch.arange(ordered.numel()) - begins
    kept = pair_expert.clone()
    kept[order[place >= capacity]] = NOWHERE
    return kept.view(expert_TK.shape)


class CapacityExchange:
    """An exchange behind a capacity.

    Args:
        inner: what moves the rows that remain.
        factor: capacity over the mean rows per expert of a rank's batch.
        num_experts: physical experts of the layer.
        on_dropped: told how many pairs a batch lost, when it lost any.

    Raises:
        ConfigError: the factor is not positive.
    """

    def __init__(
        self,
        inner: Exchange,
        factor: float,
        num_experts: int,
        on_dropped: Callable[[int], None] = lambda number: None,
    ) -> None:
        if factor <= 0:
            raise ConfigError("A capacity factor is above zero.", param="capacity_factor")
        self._inner = inner
        self._factor = factor
        self._num_experts = num_experts
        self._on_dropped = on_dropped
        self.num_dropped = 0
        """Pairs of row and expert dropped so far."""

    @property
    def name(self) -> str:
        """The scheme underneath."""
        return self._inner.name

    def dispatch(
        self, hidden_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> Pending:
        """See `Exchange.dispatch`; dropped pairs add nothing to their row."""
        capacity = math.ceil(self._factor * expert_TK.numel() / self._num_experts)
        kept_TK = keep_within(expert_TK, weight_TK, capacity)
        if dropped := int((kept_TK != expert_TK).sum()):
            self.num_dropped += dropped
            self._on_dropped(dropped)
        return self._inner.dispatch(hidden_TD, kept_TK, weight_TK)

    def combine(self, partial_AD: torch.Tensor, arrivals: Arrivals) -> torch.Tensor:
        """See `Exchange.combine`."""
        return self._inner.combine(partial_AD, arrivals)
