"""The attention block of every family: fused q/k/v, optional head norms and rotation, output.

Heads are split over ranks; the paged part is the backend's. The block owns no cache and no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from cluster.dist.communicator import Communicator
from replicas.attention.backend import AttentionBackend, AttentionMetadata, AttentionSpec
from replicas.kernels.ops import HeadShape, HeadTensors, Kernels
from replicas.kernels.torch_ops import TORCH_KERNELS
from replicas.layers.linear import ColumnLinear, RowLinear


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

    def __init__(  # noqa: PLR0913 - a layer's own variations are named one by one
        self,
        spec: AttentionSpec,
        backend: AttentionBackend,
        communicator: Communicator,
        *,
        sliding_window: int | None,
        scale: float | None = None,
        qk_norm_eps: float | None = None,
        kernels: Kernels = TORCH_KERNELS,
    ) -> None:
        self._backend = backend
        self._window = sliding_window
        # The backend's scale is one for the model; a layer's own is folded into the queries.
        self._query_factor = 1.0 if scale is None else scale / spec.scale
        self._has_norms = qk_norm_eps is not None
        self._kernels = kernels
        self._heads = HeadShape(
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            norm_eps=qk_norm_eps or 0.0,
        )
        self._qkv = ColumnLinear("qkv", kernels)
        self._out = RowLinear("attention_out", communicator, kernels)
        # A factor on the queries stands between projection and attention: step by step then.
        self._is_whole = communicator.size == 1
        self._block = None
        if self._query_factor == 1.0:
            self._block = backend.block(self._heads, sliding_window, with_bias=self._is_whole)

    def forward(
        self,
        hidden_TD: torch.Tensor,
        context: StepContext,
        tensors: Mapping[str, torch.Tensor],
        kv_2NBGP: torch.Tensor,
    ) -> torch.Tensor:
        """Attention output, (T, D), the same on every rank; writes this step's keys and values."""
        if self._block is not None:
            output_TD = self._block.forward(
                hidden_TD, context.cos_sin, tensors, kv_2NBGP, context.attention
            )
            if output_TD is not None:
                return output_TD if self._is_whole else self._out.complete(output_TD, tensors)
        query_THP, key_TGP, value_TGP = self._kernels.prepare_heads(
            self._qkv.forward(hidden_TD, tensors),
            self._heads,
            HeadTensors(
                query_norm_P=tensors["q_norm.weight"] if self._has_norms else None,
                key_norm_P=tensors["k_norm.weight"] if self._has_norms else None,
                cos_sin=context.cos_sin,
            ),
        )
        if self._query_factor != 1.0:
            query_THP = query_THP * self._query_factor
        output_THP = self._backend.forward(
            query_THP,
            key_TGP,
            value_TGP,
            kv_2NBGP,
            context.attention,
            self._window,
            tensors.get("sinks"),
        )
        return self._out.forward(output_THP.flatten(1), tensors)
