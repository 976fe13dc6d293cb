"""A mixture-of-experts block on one rank: gate, dispatch, experts, combine, shared experts.

Two layouts, told apart by `sliced`:

- tensor-parallel experts: every rank holds a slice of every expert's inner width and all rows;
  partial sums (shared experts included) meet in one all-reduce;
- expert-parallel: a rank holds whole experts. Tensor-parallel peers have the same rows, so each
  dispatches only its own share of them and gathers the others' afterwards.

Dropless: every token visits all its experts. Each forward makes exactly one dispatch and one
combine, whatever the number of rows, so that ranks stay in step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cluster.dist.communicator import Communicator
from moe.exchange.base import Arrivals, Exchange
from moe.experts import ExpertMath, ExpertRunner, ExpertWeights, Tensors
from moe.gating import exact_sigmoid
from moe.layout import ExpertLayout
from moe.spec import MoeSpec

ROUTER, ROUTER_BIAS, CORRECTION = "router.weight", "router.bias", "router.correction"
SHARED_GATE = "shared_gate.weight"
MIX, MIX_BIAS = "coefficient.weight", "coefficient.bias"

SharedMlp = Callable[[torch.Tensor, Tensors], torch.Tensor]
"""(T, D) rows and the layer's tensors -> this rank's partial output, (T, D) fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockParts:
    """What a block is put together from.

    `sliced`: experts' inner width is split over `communicator` (the tensor-parallel axis), else
    they are whole. `shared`: the MLP that every token visits, if the spec has one; sliced always.
    """

    layer: int
    layout: ExpertLayout
    math: ExpertMath
    communicator: Communicator
    sliced: bool
    shared: SharedMlp | None = None


class MixtureBlock:
    """One layer's mixture; holds no weights."""

    def __init__(self, spec: MoeSpec, parts: BlockParts) -> None:
        self._spec = spec
        self._parts = parts
        adds_bias = not parts.sliced or parts.communicator.rank == 0
        self._experts = ExpertRunner(parts.math, down_bias=adds_bias)

    def forward(
        self, hidden_TD: torch.Tensor, tensors: Tensors, experts: ExpertWeights
    ) -> torch.Tensor:
        """The block's output, (T, D), the same on every tensor-parallel rank.

        Args:
            tensors: the layer's own: router, shared experts.
            experts: where routed experts' weights come from.
        """
        own = slice(None) if self._parts.sliced else self._share(hidden_TD.shape[0])
        rows_TD = hidden_TD[own]
        ids_TK, weights_TK = self._route(rows_TD, tensors)
        exchange = self._exchange
        physical_TK = self._parts.layout.physical(self._parts.layer, ids_TK)
        pending = exchange.dispatch(rows_TD, physical_TK, weights_TK)
        shared_TD = self._shared(hidden_TD, tensors)  # while the rows travel
        routed_TD = self._finish(exchange, pending.wait(), experts)
        if self._spec.residual:
            routed_TD = routed_TD * self._mix(rows_TD, tensors)[:, :1]
        return self._merge(routed_TD, shared_TD, hidden_TD)

    def forward_idle(self, no_rows_0D: torch.Tensor, experts: ExpertWeights) -> None:
        """Take part in the exchange without rows of one's own; computes what others sent.

        Only for a rank whose tensor-parallel peers are idle too: their collectives are left out.
        """
        exchange = self._exchange
        shape = (0, self._spec.gate.top_k)
        nowhere = no_rows_0D.new_empty(shape, dtype=torch.int64)
        weights = no_rows_0D.new_empty(shape, dtype=torch.float32)
        self._finish(exchange, exchange.dispatch(no_rows_0D, nowhere, weights).wait(), experts)

    def likely(self, hidden_TD: torch.Tensor, tensors: Tensors) -> list[int]:
        """The logical experts that rows like these visit, those with most weight first.

        Args:
            hidden_TD, tensors: as for `forward`.
        """
        ids_TK, weights_TK = self._route(hidden_TD, tensors)
        total_E = torch.bincount(
            ids_TK.flatten(), weights_TK.flatten(), minlength=self._spec.gate.num_experts
        )
        order_E = torch.argsort(total_E, descending=True, stable=True)
        return order_E[: int(torch.count_nonzero(total_E))].tolist()

    @property
    def _exchange(self) -> Exchange:
        return self._parts.layout.exchange(self._parts.layer)

    def _share(self, num_rows: int) -> slice:
        """The rows that this tensor-parallel rank dispatches; the last ranks may have none."""
        each = -(-num_rows // self._parts.communicator.size)
        start = min(self._parts.communicator.rank * each, num_rows)
        return slice(start, min(start + each, num_rows))

    def _route(self, rows_TD: torch.Tensor, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        bias_E = tensors.get(ROUTER_BIAS)
        logits_TE = self._parts.math.linear(rows_TD, tensors, ROUTER, bias_E, wide=True)
        return self._parts.math.route(logits_TE, self._spec.gate, tensors.get(CORRECTION))

    def _finish(
        self, exchange: Exchange, arrivals: Arrivals, experts: ExpertWeights
    ) -> torch.Tensor:
        held = self._parts.layout.held(self._parts.layer)
        return exchange.combine(self._experts.forward(arrivals, held, experts), arrivals)

    def _shared(self, hidden_TD: torch.Tensor, tensors: Tensors) -> torch.Tensor | None:
        """The shared experts' partial output with its factor, (T, D) fp32."""
        if self._parts.shared is None:
            return None
        output_TD = self._parts.shared(hidden_TD, tensors)
        if self._spec.residual:
            return output_TD * self._mix(hidden_TD, tensors)[:, 1:]
        if self._spec.shared_gate:
            logit_T1 = self._parts.math.linear(hidden_TD, tensors, SHARED_GATE, wide=True)
            return output_TD * exact_sigmoid(logit_T1)
        return output_TD

    def _mix(self, rows_TD: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        """Shares of experts and residual MLP, (T, 2) fp32."""
        bias = tensors.get(MIX_BIAS)
        return self._parts.math.linear(rows_TD, tensors, MIX, bias, wide=True).softmax(dim=-1)

    def _merge(
        self, routed: torch.Tensor, shared_TD: torch.Tensor | None, hidden_TD: torch.Tensor
    ) -> torch.Tensor:
        """The sum of both parts over the tensor-parallel ranks, in the model's dtype."""
        communicator, dtype = self._parts.communicator, hidden_TD.dtype
        if communicator.size == 1:
            return (routed if shared_TD is None else routed + shared_TD).to(dtype)
        if self._parts.sliced:
            whole = routed if shared_TD is None else routed + shared_TD
            return communicator.all_reduce(whole.to(dtype))
        routed_TD = self._gathered(routed.to(dtype), hidden_TD.shape[0])
        if shared_TD is None:
            return routed_TD
        return routed_TD + communicator.all_reduce(shared_TD.to(dtype))

    def _gathered(self, share_SD: torch.Tensor, num_rows: int) -> torch.Tensor:
        """All ranks' shares in order; shorter ones travel padded."""
        each = -(-num_rows // self._parts.communicator.size)
        padded = share_SD.new_zeros(each, share_SD.shape[1])
        padded[: share_SD.shape[0]] = share_SD
        return self._parts.communicator.all_gather(padded, dim=0)[:num_rows]
