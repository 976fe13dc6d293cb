"""An expert layout over the ranks of a group: who holds what, and the exchange of each layer.

Implements `moe.layout.ExpertLayout` for one rank. Built from a placement per layer that all ranks
know; the exchanges come from the rank's one set, so that a switch of scheme reaches all layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe.exchange.base import Exchange
from moe.exchange.capacity import CapacityExchange
from moe.exchange.exchanges import Exchanges
from moe.expert_slots import ExpertSlots
from moe.expert_table import ExpertTable
from moe.replica_choice import ReplicaChoice
from moe.row_counter import RowCounter


class SpreadExperts:
    """The experts of all mixture layers as one rank sees them.

    Args:
        tables: placement of each mixture layer.
        exchanges: this rank's.
        rank: this rank.
        capacity_factor: bound on the rows to one expert, see `CapacityExchange`; None: none.

    Raises:
        ConfigError: a placement is for another number of ranks.
    """

    def __init__(
        self,
        tables: Sequence[ExpertTable],
        exchanges: Exchanges,
        rank: int,
        capacity_factor: float | None = None,
    ) -> None:
        self.exchanges = exchanges
        self.tables = tuple(tables)
        slots = {table.layer: table.slots for table in tables}
        self.counter = RowCounter({layer: each.num_experts for layer, each in slots.items()})
        self._rank = rank
        self._capacity_factor = capacity_factor
        self._held = {layer: each.logical_by_rank[rank] for layer, each in slots.items()}
        self._exchange = {layer: self._exchange_of(layer, each) for layer, each in slots.items()}
        self._choice = {
            layer: ReplicaChoice(each, exchanges.topology, rank) for layer, each in slots.items()
        }

    def held(self, layer: int) -> tuple[int, ...]:
        """The logical expert in each of this rank's slots."""
        return self._held[layer]

    def exchange(self, layer: int) -> Exchange:
        """What moves this layer's rows."""
        return self._exchange[layer]

    def physical(self, layer: int, expert_TK: torch.Tensor) -> torch.Tensor:
        """The slot each row visits for each of its experts, int64; the rows are counted."""
        self.counter.add(layer, expert_TK)
        return self._choice[layer].physical(expert_TK)

    def _exchange_of(self, layer: int, slots: ExpertSlots) -> Exchange:
        exchange = self.exchanges.for_layer(layer, slots)
        if self._capacity_factor is None:
            return exchange
        return CapacityExchange(
            exchange, self._capacity_factor, slots.num_slots, self.counter.add_dropped
        )
