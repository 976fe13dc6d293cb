"""An expert layout over the ranks of a group: who holds what, and the exchange of each layer.

Implements `moe.layout.ExpertLayout` for one rank. Built from a placement per layer that all ranks
know; the exchanges come from the rank's one set, so that a switch of scheme reaches all layers.
When the group ends, the layout outlives it (the model holds on to it) and joins the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cluster.base.errors import InternalError
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
    exchange: Exchange | None
    choice: ReplicaChoice | None


class SpreadExperts:
    """The experts of all mixture layers as one rank sees them.

    Args:
        tables: placement of each mixture layer.
        exchanges: this rank's; None: it is in no group yet, and only `held` can be asked.
        rank: this rank, as the tables and exchanges count.
        capacity_factor: bound on the rows to one expert, see `CapacityExchange`; None: none.

    Raises:
        ConfigError: a placement is for another number of ranks.
    """

    def __init__(
        self,
        tables: Sequence[ExpertTable],
        exchanges: Exchanges | None,
        rank: int,
        capacity_factor: float | None = None,
    ) -> None:
        slots = {table.layer: table.slots for table in tables}
        self.counter = RowCounter({layer: each.num_experts for layer, each in slots.items()})
        self._capacity_factor = capacity_factor
        self._exchanges = exchanges
        self._rank = rank
        self._layers = {table.layer: self.prepare(table) for table in tables}

    @property
    def exchanges(self) -> Exchanges:
        """This rank's.

        Raises:
            InternalError: it is in no group.
        """
        if self._exchanges is None:
            raise InternalError("A rank that is in no group exchanges nothing.")
        return self._exchanges

    @property
    def tables(self) -> tuple[ExpertTable, ...]:
        """Where the experts are now, by layer."""
        return tuple(layer.table for layer in self._layers.values())

    def rejoin(self, tables: Sequence[ExpertTable], exchanges: Exchanges, rank: int) -> None:
        """Take a place in another group, between steps; rows go on being counted.

        Raises:
            ConfigError: a placement is for another number of ranks.
        """
        self._exchanges = exchanges
        self._rank = rank
        self._layers = {table.layer: self.prepare(table) for table in tables}

    def prepare(self, table: ExpertTable) -> LayerLayout:
        """What `use` needs for another placement of a layer; changes nothing, from any thread.

        Raises:
            ConfigError: the placement is for another number of ranks.
        """
        slots, exchanges = table.slots, self._exchanges
        held = slots.logical_by_rank[self._rank]
        if exchanges is None:
            return LayerLayout(table=table, held=held, exchange=None, choice=None)
        return LayerLayout(
            table=table,
            held=held,
            exchange=self._exchange_of(table.layer, slots, exchanges),
            choice=ReplicaChoice(slots, exchanges.topology, self._rank, table.shares),
        )

    def use(self, layout: LayerLayout) -> None:
        """Move a layer's experts; between steps, and the same at all ranks."""
        self._layers[layout.table.layer] = layout

    def held(self, layer: int) -> tuple[int, ...]:
        """The logical expert in each of this rank's slots."""
        return self._layers[layer].held

    def exchange(self, layer: int) -> Exchange:
        """What moves this layer's rows."""
        exchange = self._layers[layer].exchange
        if exchange is None:
            raise InternalError("A rank that is in no group exchanges nothing.")
        return exchange

    def physical(self, layer: int, expert_TK: torch.Tensor) -> torch.Tensor:
        """The slot each row visits for each of its experts, int64; the rows are counted."""
        choice = self._layers[layer].choice
        if choice is None:
            raise InternalError("A rank that is in no group routes nothing.")
        self.counter.add(layer, expert_TK)
        return choice.physical(expert_TK)

    def _exchange_of(self, layer: int, slots: ExpertSlots, exchanges: Exchanges) -> Exchange:
        exchange = exchanges.for_layer(layer, slots)
        if self._capacity_factor is None:
            return exchange
        return CapacityExchange(
            exchange, self._capacity_factor, slots.num_slots, self.counter.add_dropped
        )
