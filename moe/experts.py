"""The routed experts of one rank, over the rows that arrived for them.

Experts are taken in ascending logical id and their weighted outputs added up in fp32, so a row's
sum does not depend on the slots its experts lie in. A row is computed by itself: its bits depend
neither on the rows beside it nor on how many there are (as far as the linears keep that promise).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from moe.exchange.base import Arrivals

UP, DOWN = "gate_up.weight", "down.weight"
UP_BIAS, DOWN_BIAS = "gate_up.bias", "down.bias"


class ExpertMath(Protocol):
    """What an expert is computed with."""

    def linear(
        self,
        input_TI: torch.Tensor,
        tensors: Mapping[str, torch.Tensor],
        name: str,
        bias_O: torch.Tensor | None = None,
        *,
        wide: bool = False,
    ) -> torch.Tensor:
        """input W^T + bias with the weight `name`, (T, O); `wide`: fp32 output."""
        ...

    def gate(self, gate_up_TF: torch.Tensor) -> torch.Tensor:
        """The gated activation of fused gate and up halves, (T, F / 2)."""
        ...


class ExpertWeights(Protocol):
    """The routed experts' weights of one layer, by logical expert."""

    def acquire(self, expert: int) -> Mapping[str, torch.Tensor]:
        """`gate_up.weight` (2F, D), `down.weight` (D, F) and biases, valid until released."""
        ...

    def release(self, expert: int) -> None:
        """The step is done with this expert."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertRunner:
    """Computes the experts of one layer."""

    math: ExpertMath
    down_bias: bool = True
    """Whether this rank adds the bias of `down`: one of the ranks that share an expert does."""

    def forward(
        self, arrivals: Arrivals, held: Sequence[int], weights: ExpertWeights
    ) -> torch.Tensor:
        """For each arrived row the weighted sum over its local experts, (A, D) fp32.

        Args:
            held: logical expert of each local slot.
        """
        partial_AD = torch.zeros_like(arrivals.hidden_AD, dtype=torch.float32)
        offsets = arrivals.offsets_L1.tolist()
        for slot in sorted(range(len(held)), key=held.__getitem__):
            pairs = slice(offsets[slot], offsets[slot + 1])
            if pairs.start == pairs.stop:
                continue
            row_M = arrivals.row_M[pairs]
            with _acquired(weights, held[slot]) as tensors:
                output_MD = self._expert(arrivals.hidden_AD[row_M], tensors)
            # A row visits an expert once, so no two additions meet in one element.
            partial_AD.index_add_(0, row_M, output_MD * arrivals.weight_M[pairs, None])
        return partial_AD

    def _expert(self, hidden_MD: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        gate_up_MF = self.math.linear(hidden_MD, tensors, UP, tensors.get(UP_BIAS))
        bias_D = tensors.get(DOWN_BIAS) if self.down_bias else None
        return self.math.linear(self.math.gate(gate_up_MF), tensors, DOWN, bias_D, wide=True)


@contextmanager
def _acquired(weights: ExpertWeights, expert: int) -> Iterator[Mapping[str, torch.Tensor]]:
    tensors = weights.acquire(expert)
    try:
        yield tensors
    finally:
        weights.release(expert)
