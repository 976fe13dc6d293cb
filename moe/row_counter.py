"""How many rows one rank has sent to each logical expert, and how many it dropped.

Counted where rows are routed, so that the ranks' counts add up to every routed row once. One
`bincount` per layer and step; nobody is told until somebody asks. Another thread may read while a
step runs: it sees the step's layers counted or not, never a number that shrinks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch


class RowCounter:
    """Totals since the rank began.

    Args:
        num_experts: logical experts of each mixture layer, by the decoder layer's index.
    """

    def __init__(self, num_experts: Mapping[int, int]) -> None:
        self._rows = {
            layer: torch.zeros(count, dtype=torch.int64) for layer, count in num_experts.items()
        }
        self.num_dropped = 0
        """Pairs of row and expert left out for want of capacity."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The mixture layers, ascending; `rows` is parallel to them."""
        return tuple(sorted(self._rows))

    @property
    def rows(self) -> list[list[int]]:
        """Rows to each logical expert, for each of `layers`."""
        return [self._rows[layer].tolist() for layer in self.layers]

    def add_dropped(self, number: int) -> None:
        """Take in what a layer left out."""
        self.num_dropped += number

    def add(self, layer: int, expert_TK: torch.Tensor) -> None:
        """Take in what a layer has routed: int64 logical experts."""
        rows_E = self._rows[layer]
        rows_E += torch.bincount(expert_TK.flatten(), minlength=rows_E.numel())
