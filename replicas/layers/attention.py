"""The attention block of every family: fused q/k/v, optional head norms and rotation, output.

Heads are split over ranks; the paged part is the backend's. The block owns no cache and no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from cluster.dist.communicator import Communicator
from replicas.attention.backend import AttentionBackend, AttentionMetadata, AttentionSpec
from replicas.layers.linear import ColumnLinear, RowLinear
from replicas.layers.norms import RmsNorm
from replicas.layers.rotary import rotate


@dataclass(frozen=True, slots=True, kw_only=True)
class StepContext:
    """What all layers of one step share."""

    attention: AttentionMetadata
    cos_sin: tuple[torch.Tensor, torch.Tensor] | None = None
    """(T, 1, P) each; None when positions are not rotary."""


class SelfAttention:
    """Causal self-attention of one layer on one rank.

    Args:
        spec: local head counts; its `scale` is what the backend applies.
        scale: this layer's own score scale, when it differs.
        qk_norm_eps: epsilon of RMS norms over each query and key head (Qwen3); None: no norms.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        backend: AttentionBackend,
        communicator: Communicator,
        *,
        sliding_window: int | None,
        scale: float | None = None,
        qk_norm_eps: float | None = None,
    ) -> None:
        self._spec = spec
        self._backend = backend
        self._window = sliding_window
        # The backend's scale is one for the model; a layer's own is folded into the queries.
        self._query_factor = 1.0 if scale is None else scale / spec.scale
        self._query_norm = self._key_norm = None
        if qk_norm_eps is not None:
            self._query_norm = RmsNorm("q_norm", qk_norm_eps)
            self._key_norm = RmsNorm("k_norm", qk_norm_eps)
        self._qkv = ColumnLinear("qkv")
        self._out = RowLinear("attention_out", communicator)

    def forward(
        self,
        hidden_TD: torch.Tensor,
        context: StepContext,
        tensors: Mapping[str, torch.Tensor],
        kv_2NBGP: torch.Tensor,
    ) -> torch.Tensor:
        """Attention output, (T, D), the same on every rank; writes this step's keys and values."""
        query_THP, key_TGP, value_TGP = self._project(hidden_TD, tensors)
        if context.cos_sin is not None:
            query_THP = rotate(query_THP, *context.cos_sin)
            key_TGP = rotate(key_TGP, *context.cos_sin)
        if self._query_factor != 1.0:
            query_THP = query_THP * self._query_factor
        output_THP = self._backend.forward(
            query_THP, key_TGP, value_TGP, kv_2NBGP, context.attention, self._window
        )
        return self._out.forward(output_THP.flatten(1), tensors)

    def _project(
        self, hidden_TD: torch.Tensor, tensors: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        heads, kv_heads = self._spec.num_heads, self._spec.num_kv_heads
        fused = self._qkv.forward(hidden_TD, tensors)
        split = fused.view(hidden_TD.shape[0], heads + 2 * kv_heads, self._spec.head_dim)
        query_THP, key_TGP, value_TGP = torch.split(split, [heads, kv_heads, kv_heads], dim=1)
        if self._query_norm is not None and self._key_norm is not None:
            query_THP = self._query_norm.forward(query_THP, tensors)
            key_TGP = self._key_norm.forward(key_TGP, tensors)
        return query_THP, key_TGP, value_TGP
