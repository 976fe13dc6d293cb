"""OPT (arXiv 2205.01068): learned positions with an offset, ReLU MLP, tied embeddings.

OPT-350m normalises after the residual sums, has no final norm, and projects between a narrower
embedding and the layers; both shapes are data in `ArchConfig`. The projection out is part of the
logits, so hidden states are always (T, D). Reference: `transformers.models.opt.modeling_opt`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional

from replicas.layers.attention import StepContext
from replicas.layers.linear import PlainMlp
from replicas.layers.norms import LayerNorm
from replicas.layers.vocab import VocabEmbedding, VocabHead
from replicas.layers.weights import WeightProvider, acquired
from replicas.models.arch import ArchConfig
from replicas.models.context import ModelContext
from replicas.models.decoder import ForwardBatch
from replicas.models.weight_units import weight_units


class OptLayer:
    """Attention and MLP with residual sums; norms before each block, or after each sum."""

    def __init__(self, arch: ArchConfig, context: ModelContext, index: int) -> None:
        self._norm_before = arch.norm_before
        self._attention_norm = LayerNorm("attention_norm", arch.norm_eps)
        self._attention = context.self_attention(arch, index)
        self._mlp_norm = LayerNorm("mlp_norm", arch.norm_eps)
        self._mlp = PlainMlp(arch.activation, context.communicator, context.kernels)

    def forward(
        self,
        hidden_TD: torch.Tensor,
        context: StepContext,
        tensors: Mapping[str, torch.Tensor],
        kv_2NBGP: torch.Tensor,
    ) -> torch.Tensor:
        """The layer's output, (T, D); writes this step's keys and values."""
        if self._norm_before:
            normed_TD = self._attention_norm.forward(hidden_TD, tensors)
            hidden_TD = hidden_TD + self._attention.forward(normed_TD, context, tensors, kv_2NBGP)
            normed_TD = self._mlp_norm.forward(hidden_TD, tensors)
            return hidden_TD + self._mlp.forward(normed_TD, tensors)
        summed_TD = hidden_TD + self._attention.forward(hidden_TD, context, tensors, kv_2NBGP)
        hidden_TD = self._attention_norm.forward(summed_TD, tensors)
        summed_TD = hidden_TD + self._mlp.forward(hidden_TD, tensors)
        return self._mlp_norm.forward(summed_TD, tensors)


class OptModel:
    """A `DecoderModel`; see there for the contract.

    Raises:
        ConfigError: the model cannot be split over the ranks.
    """

    def __init__(self, arch: ArchConfig, context: ModelContext) -> None:
        communicator = context.communicator
        self.arch = arch
        self.kernels = context.kernels
        self.units = weight_units(arch, communicator.rank, communicator.size)
        self._embedding = VocabEmbedding(communicator, context.kernels)
        self._layers = [OptLayer(arch, context, index) for index in range(arch.num_layers)]
        self._norm = LayerNorm("norm", arch.norm_eps)
        self._head = VocabHead(arch.vocab_size, communicator, context.kernels)

    def forward(
        self, batch: ForwardBatch, weights: WeightProvider, kv_caches: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Hidden states after the final norm (if there is one), (T, D)."""
        hidden_TD, context = self.begin(batch, weights)
        for index in range(self.arch.num_layers):
            hidden_TD = self.layer(index, hidden_TD, context, weights, kv_caches[index])
        return self.end(hidden_TD, weights)

    def begin(
        self, batch: ForwardBatch, weights: WeightProvider
    ) -> tuple[torch.Tensor, StepContext]:
        """Embeddings of tokens and positions, (T, D), and what all layers share."""
        with acquired(weights, "embed") as tensors:
            hidden_TD = self._embed(batch, tensors)
        return hidden_TD, StepContext(attention=batch.attention)

    def layer(
        self,
        index: int,
        hidden_TD: torch.Tensor,
        context: StepContext,
        weights: WeightProvider,
        kv_2NBGP: torch.Tensor,
    ) -> torch.Tensor:
        """Output of one layer, (T, D); writes the tokens' keys and values."""
        with acquired(weights, f"layer.{index}") as tensors:
            return self._layers[index].forward(hidden_TD, context, tensors, kv_2NBGP)

    def end(self, hidden_TD: torch.Tensor, weights: WeightProvider) -> torch.Tensor:
        """Hidden states after the final norm (if there is one), (T, D)."""
        if not self.arch.final_norm:
            return hidden_TD
        if not self.arch.norm_affine:
            return self._norm.forward(hidden_TD, {})
        with acquired(weights, "norm") as tensors:
            return self._norm.forward(hidden_TD, tensors)

    def forward_idle(self, weights: WeightProvider) -> None:
        """There are no experts."""

    def logits(self, hidden_RD: torch.Tensor, weights: WeightProvider) -> torch.Tensor:
        """Logits over the true vocabulary, (R, V) fp32, on every rank."""
        with acquired(weights, "head") as tensors:
            if self.arch.embed_dim:
                hidden_RD = self.kernels.linear(hidden_RD, tensors, "project_out.weight")
            return self._head.forward(hidden_RD, tensors)

    def _embed(self, batch: ForwardBatch, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        hidden_TD = self._embedding.forward(batch.token_ids_T, tensors)
        if self.arch.embed_dim:
            hidden_TD = self.kernels.linear(hidden_TD, tensors, "project_in.weight")
        rows_T = batch.positions_T + self.arch.position_offset
        return hidden_TD + functional.embedding(rows_T, tensors["positions"])
