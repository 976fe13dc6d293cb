"""GPT-2: layer norm before each block, learned positions, plain MLP, tied embeddings.

Score scales (with or without head_dim, by depth) are per-layer data in `ArchConfig`.
Reference: `transformers.models.gpt2.modeling_gpt2`.
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


class Gpt2Layer:
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, arch: ArchConfig, context: ModelContext, index: int) -> None:
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
        normed_TD = self._attention_norm.forward(hidden_TD, tensors)
        hidden_TD = hidden_TD + self._attention.forward(normed_TD, context, tensors, kv_2NBGP)
        normed_TD = self._mlp_norm.forward(hidden_TD, tensors)
        return hidden_TD + self._mlp.forward(normed_TD, tensors)


class Gpt2Model:
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
        self._layers = [Gpt2Layer(arch, context, index) for index in range(arch.num_layers)]
        self._norm = LayerNorm("norm", arch.norm_eps)
        self._head = VocabHead(arch.vocab_size, communicator, context.kernels)

    def forward(
        self, batch: ForwardBatch, weights: WeightProvider, kv_caches: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Hidden states after the final norm, (T, D)."""
        context = StepContext(attention=batch.attention)
        with acquired(weights, "embed") as tensors:
            hidden_TD = self._embedding.forward(batch.token_ids_T, tensors)
            hidden_TD = hidden_TD + functional.embedding(batch.positions_T, tensors["positions"])
        for index, layer in enumerate(self._layers):
            with acquired(weights, f"layer.{index}") as tensors:
                hidden_TD = layer.forward(hidden_TD, context, tensors, kv_caches[index])
        with acquired(weights, "norm") as tensors:
            return self._norm.forward(hidden_TD, tensors)

    def forward_idle(self, weights: WeightProvider) -> None:
        """There are no experts."""

    def logits(self, hidden_RD: torch.Tensor, weights: WeightProvider) -> torch.Tensor:
        """Logits over the true vocabulary, (R, V) fp32, on every rank."""
        with acquired(weights, "head") as tensors:
            return self._head.forward(hidden_RD, tensors)
