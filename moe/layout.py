"""Where the experts of each layer are, as one rank sees it.

A layout is asked anew on every forward pass, so whoever owns it may move experts between steps. A
physical expert is a slot on some rank; several may hold copies of one logical expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from moe.exchange.local import LocalExchange

if TYPE_CHECKING:
    import torch

    from moe.exchange.base import Exchange


class ExpertLayout(Protocol):
    """The experts of all layers; `layer` is the decoder layer's index."""

    def held(self, layer: int) -> tuple[int, ...]:
        """The logical expert in each of this rank's slots, distinct; the slots are the local
        experts of `Arrivals`."""
        ...

    def exchange(self, layer: int) -> Exchange:
        """What moves this layer's rows."""
        ...

    def physical(self, layer: int, expert_TK: torch.Tensor) -> torch.Tensor:
        """The experts that `exchange(layer)` sends to, int64, for logical ones."""
        ...


class AllHere:
    """Every expert on this rank, in its own slot: one rank, or experts sliced over ranks."""

    def __init__(self, num_experts: Mapping[int, int]) -> None:
        """Args: number of experts by layer index."""
        self._held = {layer: tuple(range(count)) for layer, count in num_experts.items()}
        self._exchange = {layer: LocalExchange(count) for layer, count in num_experts.items()}

    def held(self, layer: int) -> tuple[int, ...]:
        """All logical experts in order."""
        return self._held[layer]

    def exchange(self, layer: int) -> Exchange:
        """Nothing travels."""
        return self._exchange[layer]

    def physical(self, layer: int, expert_TK: torch.Tensor) -> torch.Tensor:
        """Slots are logical experts."""
        return expert_TK
