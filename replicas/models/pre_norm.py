"""What models of pre-norm layers have in common, their MLP dense or a mixture of experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import torch

from replicas.layers.attention import StepContext
from replicas.layers.mixture import ExpertUnits, Foresight
from replicas.layers.norms import Norm
from replicas.layers.vocab import VocabEmbedding, VocabHead
from replicas.layers.weights import WeightProvider, acquired
from replicas.models.arch import ArchConfig
from replicas.models.context import ModelContext
from replicas.models.weight_units import weight_units


class DecoderLayer(Protocol):
    """One layer of such a model."""

    def forward(
        self,
        hidden_TD: torch.Tensor,
        context: StepContext,
        weights: WeightProvider,
        kv_2NBGP: torch.Tensor,
    ) -> torch.Tensor:
        """The layer's output, (T, D); writes this step's keys and values."""
        ...

    def forward_idle(self, no_rows_0D: torch.Tensor, weights: WeightProvider) -> None:
        """A mixture's exchange without rows."""
        ...


N = TypeVar("N", bound=Norm)
L = TypeVar("L", bound=DecoderLayer)


class PreNormLayer(Generic[N]):
    """A layer's mixture, if it has one, and its place among the others.

    Args:
        mlp_norm: the one before MLP or mixture.
        following: the next layer.
    """

    def __init__(
        self,
        arch: ArchConfig,
        context: ModelContext,
        index: int,
        mlp_norm: N,
        following: PreNormLayer[N] | None,
    ) -> None:
        self._mlp_norm = mlp_norm
        self._mixture = context.mixture(arch, index)
        self._index = index
        self._next = None if following is None else following.foresight

    @property
    def foresight(self) -> Foresight | None:
        """How the layer before sees what this one's mixture will visit; None in a dense layer."""
        if self._mixture is None:
            return None
        return Foresight(self._index, self._mlp_norm.forward, self._mixture)

    def forward_idle(self, no_rows_0D: torch.Tensor, weights: WeightProvider) -> None:
        """A mixture's exchange without rows, while the layer is held as in `forward`: ranks that
        fill its memory together all pass through it."""
        with acquired(weights, f"layer.{self._index}"):
            if self._mixture is not None:
                self._mixture.forward_idle(no_rows_0D, ExpertUnits(weights, self._index))

    def _experts(self, hidden_TD: torch.Tensor, weights: WeightProvider) -> ExpertUnits:
        """The layer's experts; once its own are announced, those of the next are guessed."""
        return ExpertUnits(
            weights, self._index, announced=lambda: self._look_ahead(hidden_TD, weights)
        )

    def _look_ahead(self, hidden_TD: torch.Tensor, weights: WeightProvider) -> None:
        if self._next is not None:
            self._next.tell(hidden_TD, weights)


class PreNormDecoder(Generic[L, N]):
    """The part of a `DecoderModel` that does not depend on what its layers are made of.

    Args:
        norm: the final one.
        make_layer: the layer of an index, given the one that follows it.

    Raises:
        ConfigError: the model cannot be split over the ranks.
    """

    def __init__(
        self,
        arch: ArchConfig,
        context: ModelContext,
        norm: N,
        make_layer: Callable[[int, L | None], L],
    ) -> None:
        communicator = context.communicator
        self.arch = arch
        self.kernels = context.kernels
        self._dtype, self._device = context.dtype, context.device
        held = context.held_experts(arch)
        self.units = weight_units(arch, communicator.rank, communicator.size, held)
        self._embedding = VocabEmbedding(communicator, context.kernels)
        self._layers: list[L] = []
        for index in reversed(range(arch.num_layers)):
            following = self._layers[0] if self._layers else None
            self._layers.insert(0, make_layer(index, following))
        self._norm = norm
        self._head = VocabHead(arch.vocab_size, communicator, context.kernels)

    def layer(
        self,
        index: int,
        hidden_TD: torch.Tensor,
        context: StepContext,
        weights: WeightProvider,
        kv_2NBGP: torch.Tensor,
    ) -> torch.Tensor:
        """Output of one layer, (T, D); writes the tokens' keys and values."""
        return self._layers[index].forward(hidden_TD, context, weights, kv_2NBGP)

    def end(self, hidden_TD: torch.Tensor, weights: WeightProvider) -> torch.Tensor:
        """Hidden states after the final norm, (T, D)."""
        with acquired(weights, "norm") as tensors:
            return self._norm.forward(hidden_TD, tensors)

    def forward_idle(self, weights: WeightProvider) -> None:
        """The exchanges of all mixture layers, without rows."""
        shape = (0, self.arch.model_dim)
        no_rows_0D = torch.empty(shape, dtype=self._dtype, device=self._device)
        for layer in self._layers:
            layer.forward_idle(no_rows_0D, weights)

    def logits(self, hidden_RD: torch.Tensor, weights: WeightProvider) -> torch.Tensor:
        """Logits over the true vocabulary, (R, V) fp32, on every rank."""
        with acquired(weights, "head") as tensors:
            return self._head.forward(hidden_RD, tensors)
