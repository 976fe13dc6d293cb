"""The routed experts of one rank, over the rows that arrived for them.

Weighted outputs are settled and their sums exact (`moe/exact_sums.py`), so a row's sum depends
neither on the slots nor on the ranks its experts lie in. A row is computed by itself: its bits
depend neither on the rows beside it nor on how many there are (as far as the linears keep that
promise). Experts may be taken in any order.

Two ways with the same bits: all experts in one call, where the kernels can and the weights stay in
place, which was never slower in any measured shape; else one expert after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

from moe.exact_sums import heaviest, settle
from moe.exchange.base import Arrivals
from moe.spec import GateSpec

UP, DOWN = "gate_up.weight", "down.weight"
UP_BIAS, DOWN_BIAS = "gate_up.bias", "down.bias"

Tensors = Mapping[str, torch.Tensor]
Made = TypeVar("Made")
Make = Callable[[Sequence[Tensors], tuple[int, ...]], Made | None]


class GroupedExperts(Protocol):
    """A rank's experts of one layer, computed in one call."""

    def forward(
        self, hidden_AD: torch.Tensor, slot_AK: torch.Tensor, weight_AK: torch.Tensor
    ) -> torch.Tensor:
        """For each row the sum of its local experts' settled outputs, (A, D) fp64.

        Args:
            slot_AK, weight_AK: as in `Arrivals`.
        """
        ...


class ExpertMath(Protocol):
    """What an expert is computed with."""

    @property
    def on_host(self) -> ExpertMath:
        """The same for weights that lie in host memory."""
        ...

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
        """The gated activation of fused gate and up halves, (T, F / 2); of experts that are not
        gated the plain one, (T, F)."""
        ...

    def route(
        self, logits_TE: torch.Tensor, spec: GateSpec, bias_E: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Experts and weights of every token; see `moe.gating.route`."""
        ...

    def grouped(
        self, experts: Sequence[Tensors], held: Sequence[int], *, down_bias: bool
    ) -> GroupedExperts | None:
        """The experts as one call with the bits of one by one; None where there is no such thing.

        Args:
            experts: tensors of each slot, which stay as they are.
            held: logical expert of each slot.
        """
        ...


class ExpertWeights(Protocol):
    """The routed experts' weights of one layer, by logical expert."""

    def acquire(self, expert: int) -> Mapping[str, torch.Tensor]:
        """`gate_up.weight` (2F, D), or (F, D) of experts that are not gated, `down.weight` (D, F)
        and biases, valid until released; where they lie, the expert is computed."""
        ...

    def announce(self, experts: Sequence[int], rows: Sequence[int]) -> Sequence[int]:
        """These are acquired next, one after the other, each for so many rows.

        Returns:
            The order that waits least, as indices into `experts`: any is right.
        """
        ...

    def lasting(self, held: tuple[int, ...], make: Make[Made]) -> Made | None:
        """`make(tensors of each held expert, held)`, kept for the next time with the same `held`.

        None: the tensors do not stay in one place.
        """
        ...

    def release(self, expert: int) -> None:
        """The step is done with this expert."""
        ...


class ExpertRunner:
    """Computes the experts of one layer.

    Args:
        down_bias: whether this rank adds the bias of `down`: one of the ranks that share an expert
            does.
    """

    def __init__(self, math: ExpertMath, *, down_bias: bool = True) -> None:
        self._math = math
        self._down_bias = down_bias

    def forward(
        self, arrivals: Arrivals, held: tuple[int, ...], weights: ExpertWeights
    ) -> torch.Tensor:
        """For each arrived row the sum of its local experts' settled outputs, (A, D) fp64.

        Args:
            held: logical expert of each local slot.
        """
        together = weights.lasting(held, self._together)
        if together is None:
            return self.one_by_one(arrivals, held, weights)
        return together.forward(arrivals.hidden_AD, arrivals.slot_AK, arrivals.weight_AK)

    def one_by_one(
        self, arrivals: Arrivals, held: tuple[int, ...], weights: ExpertWeights
    ) -> torch.Tensor:
        """`forward` in a loop over the experts that are visited."""
        partial_AD = torch.zeros_like(arrivals.hidden_AD, dtype=torch.float64)
        heaviest_A = heaviest(arrivals.weight_AK)
        pairs = arrivals.pairs()
        offsets = pairs.offsets_L1.tolist()
        order = sorted(range(len(held)), key=held.__getitem__)
        visited = [slot for slot in order if offsets[slot] < offsets[slot + 1]]
        rows = [offsets[slot + 1] - offsets[slot] for slot in visited]
        for index in weights.announce([held[slot] for slot in visited], rows):
            slot = visited[index]
            own = slice(offsets[slot], offsets[slot + 1])
            row_M, weight_M = pairs.row_M[own], pairs.weight_M[own]
            with _acquired(weights, held[slot]) as tensors:
                output_MD = self._expert(arrivals.hidden_AD[row_M], tensors)
            settled_MD = settle(output_MD * weight_M[:, None], weight_M, heaviest_A[row_M])
            # A row visits an expert once, so no two additions meet in one element.
            partial_AD.index_add_(0, row_M, settled_MD.double())
        return partial_AD

    def _together(self, experts: Sequence[Tensors], held: tuple[int, ...]) -> GroupedExperts | None:
        return self._math.grouped(experts, held, down_bias=self._down_bias)

    def _expert(self, hidden_MD: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        """The expert's output (M, D) fp32, where the rows are, computed where its weights are."""
        home = next(tensor.device for tensor in tensors.values() if not tensor.is_meta)
        math = self._math if home == hidden_MD.device else self._math.on_host
        rows_MD = hidden_MD.to(home)
        gate_up_MF = math.linear(rows_MD, tensors, UP, tensors.get(UP_BIAS))
        bias_D = tensors.get(DOWN_BIAS) if self._down_bias else None
        output_MD = math.linear(math.gate(gate_up_MF), tensors, DOWN, bias_D, wide=True)
        return output_MD.to(hidden_MD.device)


@contextmanager
def _acquired(weights: ExpertWeights, expert: int) -> Iterator[Tensors]:
    tensors = weights.acquire(expert)
    try:
        yield tensors
    finally:
        weights.release(expert)
