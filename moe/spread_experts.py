"""An expert layout over the ranks of a group: who holds what, and the exchange of each layer.

Implements `moe.layout.ExpertLayout` for one rank. Built from a placement per layer that all ranks
know; the exchanges come from the rank's one set, so that a switch of scheme reaches all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moe.exchange.base import Exchange
from moe.exchange.capacity import CapacityExchange
from moe.exchange.exchanges import Exchanges
from moe.expert_slots import ExpertSlots
from moe.expert_table import ExpertTable
from moe.replica_choice import ReplicaChoice
from moe.row_counter import RowCounter


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLayout:
    """One layer's experts as a rank sees them."""

    table: ExpertTable
    held: tuple[int, ...]
    exchange: Exchange
    choice: ReplicaChoice


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
        slots = {table.layer: table.slots for table in tables}
        self.counter = RowCounter({layer: each.num_experts for layer, each in slots.items()})
        self._rank = rank
        self._capacity_factor = capacity_factor
        self._layers = {table.layer: self.prepare(table) for table in tables}

    @property
    def tables(self) -> tuple[ExpertTable, ...]:
        """Where the experts are now, by layer."""
        return tuple(layer.table for layer in self._layers.values())

    def prepare(self, table: ExpertTable) -> LayerLayout:
        """What `use` needs for another placement of a layer; changes nothing, from any thread.

        Raises:
            ConfigError: the placement is for another number of ranks.
        """
        slots = table.slots
        return LayerLayout(
            table=table,
            held=slots.logical_by_rank[self._rank],
            exchange=self._exchange_of(table.layer, slots),
            choice=ReplicaChoice(slots, self.exchanges.topology, self._rank, table.shares),
        )

    def use(self, layout: LayerLayout) -> None:
        """Move a layer's experts; between steps, and the same at all ranks."""
        self._layers[layout.table.layer] = layout

    def held(self, layer: int) -> tuple[int, ...]:
        """The logical expert in each of this rank's slots."""
        return self._layers[layer].held

    def exchange(self, layer: int) -> Exchange:
        """What moves this layer's rows."""
        return self._layers[layer].exchange

    def physical(self, layer: int, expert_TK: torch.Tensor) -> torch.Tensor:
        """The slot each row visits for each of its experts, int64; the rows are counted."""
        self.counter.add(layer, expert_TK)
        return self._layers[layer].choice.physical(expert_TK)

    def _exchange_of(self, layer: int, slots: ExpertSlots) -> Exchange:
        exchange = self.exchanges.for_layer(layer, slots)
        if self._capacity_factor is None:
            return exchange
        return CapacityExchange(
            exchange, self._capacity_factor, slots.num_slots, self.counter.add_dropped
        )
