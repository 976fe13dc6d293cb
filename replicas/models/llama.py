"""Llama, Mistral, Qwen and the mixtures: RMS pre-norm, rotary positions, gated MLP or experts.

What sets them apart (biases, head norms, windows, sinks, latent attention, RoPE scaling, experts)
is data in `ArchConfig`; there is no branch on the family here. Reference: the modelling files of
transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from cluster.base.errors import ConfigError
from replicas.layers.activations import activation
from replicas.layers.attention import StepContext
from replicas.layers.linear import GatedMlp
from replicas.layers.norms import RmsNorm
from replicas.layers.rotary import Rotary
from replicas.layers.weights import WeightProvider, acquired
from replicas.models.arch import ArchConfig
from replicas.models.context import ModelContext
from replicas.models.decoder import ForwardBatch
from replicas.models.pre_norm import PreNormDecoder, PreNormLayer

if TYPE_CHECKING:
    from replicas.kernels.cpu_shapes import HeadShape


class LlamaLayer(PreNormLayer[RmsNorm]):
    """x + attention(norm(x)), then x + mlp(norm(x)), the MLP dense or a mixture of experts."""

    def __init__(
        self, arch: ArchConfig, context: ModelContext, index: int, following: LlamaLayer | None
    ) -> None:
        mlp_norm = RmsNorm("mlp_norm", arch.norm_eps, context.kernels)
        super().__init__(arch, context, index, mlp_norm, following)
        self._attention_norm = RmsNorm("attention_norm", arch.norm_eps, context.kernels)
        self._attention = context.attention(arch, index)
        self._mlp = GatedMlp(activation(arch.activation), context.communicator, context.kernels)

    def forward(
        self,
        hidden_TD: torch.Tensor,
        context: StepContext,
        weights: WeightProvider,
        kv_2NBGP: torch.Tensor,
    ) -> torch.Tensor:
        """The layer's output, (T, D); writes this step's keys and values."""
        hidden_TD, delta_TD = self.addends(hidden_TD, None, context, weights, kv_2NBGP)
        return hidden_TD + delta_TD

    def addends(
        self,
        hidden_TD: torch.Tensor,
        delta_TD: torch.Tensor | None,
        context: StepContext,
        weights: WeightProvider,
        kv_2NBGP: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The output's two addends, for a next layer whose norm adds them: one kernel for both.

        Args:
            delta_TD: what the layer before has left to add to `hidden_TD`; None: nothing.
        """
        with acquired(weights, f"layer.{self._index}") as tensors:
            if delta_TD is None:
                normed_TD = self._attention_norm.forward(hidden_TD, tensors)
            else:
                hidden_TD, normed_TD = self._attention_norm.add_forward(
                    hidden_TD, delta_TD, tensors
                )
            attended_TD = self._attention.forward(normed_TD, context, tensors, kv_2NBGP)
            hidden_TD, normed_TD = self._mlp_norm.add_forward(hidden_TD, attended_TD, tensors)
            if self._mixture is None:
                self._look_ahead(hidden_TD, weights)
                return hidden_TD, self._mlp.forward(normed_TD, tensors)
            experts = self._experts(hidden_TD, weights)
            return hidden_TD, self._mixture.forward(normed_TD, tensors, experts)


class LlamaModel(PreNormDecoder[LlamaLayer, RmsNorm]):
    """A `DecoderModel`; see there for the contract.

    Raises:
        ConfigError: the architecture has no RoPE, or cannot be split over the ranks.
    """

    def __init__(self, arch: ArchConfig, context: ModelContext) -> None:
        if arch.rope is None:
            raise ConfigError(f"A {arch.family} model needs rotary positions.")
        super().__init__(
            arch,
            context,
            RmsNorm("norm", arch.norm_eps, context.kernels),
            lambda index, following: LlamaLayer(arch, context, index, following),
        )
        self._rotary = Rotary(arch.rope, context.dtype, context.device)
        self._stack = context.layer_stack(arch)

    @property
    def layer_seconds(self) -> Mapping[str, float]:
        """Time so far by part of the layers; empty where they are not run in one call."""
        return {} if self._stack is None else self._stack.seconds

    def forward(
        self,
        batch: ForwardBatch,
        weights: WeightProvider,
        kv_caches: Sequence[torch.Tensor],
        head: HeadShape | None = None,
    ) -> torch.Tensor:
        """Hidden states after the final norm, (T, D).

        Args:
            head: filled in where all layers are one call; else it stays as it is.
        """
        if self._stack is not None:
            output_TD = self._stack.forward(batch, self._rotary, weights, kv_caches, head)
            if output_TD is not None:
                return output_TD
        hidden_TD, context = self.begin(batch, weights)
        delta_TD = None
        for index, layer in enumerate(self._layers):
            hidden_TD, delta_TD = layer.addends(
                hidden_TD, delta_TD, context, weights, kv_caches[index]
            )
        if delta_TD is None:
            return self.end(hidden_TD, weights)
        with acquired(weights, "norm") as tensors:
            return self._norm.add_forward(hidden_TD, delta_TD, tensors)[1]

    def begin(
        self, batch: ForwardBatch, weights: WeightProvider
    ) -> tuple[torch.Tensor, StepContext]:
        """Embeddings, (T, D), and what all layers share."""
        context = StepContext(
            attention=batch.attention, cos_sin=self._rotary.angles(batch.positions_T)
        )
        with acquired(weights, "embed") as tensors:
            return self._embedding.forward(batch.token_ids_T, tensors), context
