"""What every model family offers the runner: units of weights, a forward pass, logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from replicas.attention.backend import AttentionMetadata
    from replicas.kernels.ops import Kernels
    from replicas.layers.attention import StepContext
    from replicas.layers.weights import WeightProvider, WeightUnit
    from replicas.models.arch import ArchConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """The packed tokens of one step (no padding)."""

    token_ids_T: torch.Tensor
    """int64."""
    positions_T: torch.Tensor
    """int64; absolute position in the request."""
    attention: AttentionMetadata


class DecoderModel(Protocol):
    """A decoder-only transformer on one tensor-parallel rank."""

    arch: ArchConfig
    units: tuple[WeightUnit, ...]
    """In the order the forward pass acquires them: embed, layer.0 ..., head."""
    kernels: Kernels
    """What it computes with; a loader may lay out linear weights for them."""

    def forward(
        self,
        batch: ForwardBatch,
        weights: WeightProvider,
        kv_caches: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """Hidden states after the final norm, (T, D), equal on all ranks.

        `kv_caches[i]` is layer i's (2, N, B, G, P) cache.
        """
        ...

    def forward_idle(self, weights: WeightProvider) -> None:
        """Take part in a step without tokens of one's own: the exchanges of expert-parallel layers
        alone, each layer held as in `forward`. Nothing to do for other models.

        The tensor-parallel peers of this rank have to be idle too.
        """
        ...

    def logits(self, hidden_RD: torch.Tensor, weights: WeightProvider) -> torch.Tensor:
        """Logits (R, V) in fp32 over the true vocabulary, gathered on every rank."""
        ...


class LayeredModel(DecoderModel, Protocol):
    """A decoder whose layers can be run one at a time, each over any part of a step's tokens.

    `forward` is `begin`, every `layer` in order, `end`. A layer acquires its own weight unit,
    `layer.<index>`, so whoever holds that unit may call it for several parts.
    """

    def begin(
        self, batch: ForwardBatch, weights: WeightProvider
    ) -> tuple[torch.Tensor, StepContext]:
        """What the first layer gets, (T, D), and what all layers share."""
        ...

    def layer(
        self,
        index: int,
        hidden_TD: torch.Tensor,
        context: StepContext,
        weights: WeightProvider,
        kv_2NBGP: torch.Tensor,
    ) -> torch.Tensor:
        """Output of one layer, (T, D); writes the tokens' keys and values to its cache."""
        ...

    def end(self, hidden_TD: torch.Tensor, weights: WeightProvider) -> torch.Tensor:
        """The last layer's output after the final norm, if there is one."""
        ...
