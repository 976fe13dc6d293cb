"""GPT-2: layer norm before each block, learned positions, plain MLP or experts, tied embeddings.

Score scales (with or without head_dim, by depth) are per-layer data in `ArchConfig`.
References: `transformers.models.gpt2.modeling_gpt2`; for the mixtures `deepspeed.moe.layer.MoE`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional

from replicas.layers.attention import StepContext
from replicas.layers.linear import PlainMlp
from replicas.layers.norms import LayerNorm
from replicas.layers.weights import WeightProvider, acquired
from replicas.models.arch import ArchConfig
from replicas.models.context import ModelContext
from replicas.models.decoder import ForwardBatch
from replicas.models.pre_norm import PreNormDecoder, PreNormLayer


class Gpt2Layer(PreNormLayer[LayerNorm]):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self, arch: ArchConfig, context: ModelContext, index: int, following: Gpt2Layer | None
    ) -> None:
        super().__init__(arch, context, index, LayerNorm("mlp_norm", arch.norm_eps), following)
        self._attention_norm = LayerNorm("attention_norm", arch.norm_eps)
        self._attention = context.self_attention(arch, index)
        self._mlp = PlainMlp(arch.activation, context.communicator, context.kernels)

    def forward(
        self,
        hidden_TD: torch.Tensor,
        context: StepContext,
        weights: WeightProvider,
        kv_2NBGP: torch.Tensor,
    ) -> torch.Tensor:
        """The layer's output, (T, D); writes this step's keys and values."""
        with acquired(weights, f"layer.{self._index}") as tensors:
            return self._forward(hidden_TD, context, weights, tensors, kv_2NBGP)

    def _forward(
        self,
        hidden_TD: torch.Tensor,
        context: StepContext,
        weights: WeightProvider,
        tensors: Mapping[str, torch.Tensor],
        kv_2NBGP: torch.Tensor,
    ) -> torch.Tensor:
        normed_TD = self._attention_norm.forward(hidden_TD, tensors)
        hidden_TD = hidden_TD + self._attention.forward(normed_TD, context, tensors, kv_2NBGP)
        normed_TD = self._mlp_norm.forward(hidden_TD, tensors)
        if self._mixture is None:
            self._look_ahead(hidden_TD, weights)
            return hidden_TD + self._mlp.forward(normed_TD, tensors)
        experts = self._experts(hidden_TD, weights)
        return hidden_TD + self._mixture.forward(normed_TD, tensors, experts)


class Gpt2Model(PreNormDecoder[Gpt2Layer, LayerNorm]):
    """A `DecoderModel`; see there for the contract.

    Raises:
        ConfigError: the model cannot be split over the ranks.
    """

    def __init__(self, arch: ArchConfig, context: ModelContext) -> None:
        super().__init__(
            arch,
            context,
            LayerNorm("norm", arch.norm_eps),
            lambda index, following: Gpt2Layer(arch, context, index, following),
        )

    def forward(
        self, batch: ForwardBatch, weights: WeightProvider, kv_caches: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Hidden states after the final norm, (T, D)."""
        hidden_TD, context = self.begin(batch, weights)
        for index in range(self.arch.num_layers):
            hidden_TD = self.layer(index, hidden_TD, context, weights, kv_caches[index])
        return self.end(hidden_TD, weights)

    def begin(
        self, batch: ForwardBatch, weights: WeightProvider
    ) -> tuple[torch.Tensor, StepContext]:
        """Embeddings of tokens and positions, (T, D), and what all layers share."""
        with acquired(weights, "embed") as tensors:
            hidden_TD = self._embedding.forward(batch.token_ids_T, tensors)
            hidden_TD = hidden_TD + functional.embedding(batch.positions_T, tensors["positions"])
        return hidden_TD, StepContext(attention=batch.attention)
