"""What every model family offers the runner: units of weights, a forward pass, logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from replicas.attention.backend import AttentionMetadata
    from replicas.kernels.ops import Kernels
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
        alone, in the order of `forward`. Nothing to do for other models.

        The tensor-parallel peers of this rank have to be idle too.
        """
        ...

    def logits(self, hidden_RD: torch.Tensor, weights: WeightProvider) -> torch.Tensor:
        """Logits (R, V) in fp32 over the true vocabulary, gathered on every rank."""
        ...
