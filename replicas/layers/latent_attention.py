"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), on one cached latent.

What is cached per token is the latent that keys and values are made of, and one rotated key for all
heads. The projections out of the latent are moved to the other side (section 2.1.2): queries are
taken into the latent's space, attention runs there over one shared head, and its result is taken
to each head's values. Heads are split over ranks; latents are the same on all of them.

Per-head projections are linears of their own, so that a row keeps its bits in any company.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from replicas.attention.backend import AttentionBackend, AttentionSpec
from replicas.kernels.ops import Kernels
from replicas.kernels.torch_ops import rotate
from replicas.layers.attention import StepContext
from replicas.layers.linear import RowLinear
from replicas.models.arch import LatentSpec

LATENT_NORM_EPS = 1e-6
"""DeepSeek's norms inside attention keep their class's epsilon, whatever the config says."""

Tensors = Mapping[str, torch.Tensor]


class LatentAttention:
    """Causal latent attention of one layer on one rank.

    Args:
        spec: local query heads; one key/value head of the latent's and the rotated key's width.
        out: the output projection.
    """

    def __init__(
        self,
        latent: LatentSpec,
        spec: AttentionSpec,
        backend: AttentionBackend,
        out: RowLinear,
        kernels: Kernels,
    ) -> None:
        self._latent = latent
        self._num_heads = spec.num_heads
        self._backend = backend
        self._out = out
        self._kernels = kernels

    def forward(
        self,
        hidden_TD: torch.Tensor,
        context: StepContext,
        tensors: Tensors,
        kv_1NBGP: torch.Tensor,
    ) -> torch.Tensor:
        """Attention output, (T, D), the same on every rank; writes this step's latents."""
        query_THP = self._queries(hidden_TD, context, tensors)
        cached_T1P = self._cached(hidden_TD, context, tensors)
        output_THP = self._backend.forward(
            query_THP,
            cached_T1P,
            cached_T1P,
            kv_1NBGP.expand(2, -1, -1, -1, -1),
            context.attention,
            None,
        )
        values = [
            self._kernels.linear(
                output_THP[:, head, : self._latent.rank], tensors, f"value_up.{head}.weight"
            )
            for head in range(self._num_heads)
        ]
        return self._out.forward(torch.cat(values, dim=-1), tensors)

    def _queries(
        self, hidden_TD: torch.Tensor, context: StepContext, tensors: Tensors
    ) -> torch.Tensor:
        """Queries in the latent's space with their rotated parts, (T, H, rank + rope_dim)."""
        kernels, latent = self._kernels, self._latent
        if latent.query_rank:
            down = kernels.linear(
                hidden_TD, tensors, "query_down.weight", tensors.get("query_down.bias")
            )
            hidden_TD = kernels.rms_norm(down, tensors["query_norm.weight"], LATENT_NORM_EPS)
        heads_TX = kernels.linear(hidden_TD, tensors, "query.weight")
        heads_THX = heads_TX.view(heads_TX.shape[0], self._num_heads, -1)
        nope_THX, rope_THX = torch.split(heads_THX, [latent.nope_dim, latent.rope_dim], dim=-1)
        query_THP = heads_TX.new_empty(*heads_THX.shape[:2], latent.rank + latent.rope_dim)
        for head in range(self._num_heads):
            query_THP[:, head, : latent.rank] = kernels.linear(
                nope_THX[:, head], tensors, f"key_up.{head}.weight"
            )
        query_THP[..., latent.rank :] = self._rotated(rope_THX, context)
        return query_THP

    def _cached(
        self, hidden_TD: torch.Tensor, context: StepContext, tensors: Tensors
    ) -> torch.Tensor:
        """What the cache holds of each token: normed latent, rotated key; (T, 1, P)."""
        latent = self._latent
        down_TP = self._kernels.linear(
            hidden_TD, tensors, "latent_down.weight", tensors.get("latent_down.bias")
        )
        row_TR, key_TX = torch.split(down_TP, [latent.rank, latent.rope_dim], dim=-1)
        row_TR = self._kernels.rms_norm(
            row_TR.contiguous(), tensors["latent_norm.weight"], LATENT_NORM_EPS
        )
        return torch.cat((row_TR[:, None], self._rotated(key_TX[:, None], context)), dim=-1)

    def _rotated(self, heads_THX: torch.Tensor, context: StepContext) -> torch.Tensor:
        """Rotated pairs, first members first: queries and keys alike, so their order is free."""
        assert context.cos_sin is not None
        if self._latent.interleaved:
            heads_THX = torch.cat((heads_THX[..., ::2], heads_THX[..., 1::2]), dim=-1)
        return rotate(heads_THX, *context.cos_sin)
