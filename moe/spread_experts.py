"""An expert layout over the ranks of a group: who holds what, and the exchange of each layer.

Implements `moe.layout.ExpertLayout` for one rank. Built from a placement per layer that all ranks
know; the exchanges come from the rank's one set, so that a switch of scheme reaches all layers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moe.exchange.base import Exchange
from moe.exchange.exchanges import Exchanges
from moe.expert_slots import ExpertSlots
from moe.replica_choice import ReplicaChoice


class SpreadExperts:
    """The experts of all mixture layers as one rank sees them.

    Args:
        slots: placement of each mixture layer, by the decoder layer's index.
        exchanges: this rank's.
        rank: this rank.

    Raises:
        ConfigError: a placement is for another number of ranks.
    """

    def __init__(self, slots: Mapping[int, ExpertSlots], exchanges: Exchanges, rank: int) -> None:
        self.exchanges = exchanges
        self._held = {layer: each.logical_by_rank[rank] for layer, each in slots.items()}
        self._exchange = {layer: exchanges.for_layer(layer, each) for layer, each in slots.items()}
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
        """The slot each row visits for each of its experts, int64."""
        return self._choice[layer].physical(expert_TK)
