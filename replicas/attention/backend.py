"""The attention seam: what a step tells a backend, and what a backend promises.

A backend writes this step's keys and values into the paged KV tensors and attends over the
whole context of every request, causally. It must give the same rows whatever else is in the
batch. `why_not` returns *all* reasons a backend cannot run a spec, so that selection can say so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from replicas.kernels.ops import HeadShape


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """Shape of one rank's attention; head counts are local."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    block_size: int
    dtype: str
    device: str
    sinks: bool = False
    """Each query head has a learned score that joins the softmax without a value."""
    shared_plane: bool = False
    """Values are the keys themselves: both planes of the cache are the same memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMetadata:
    """Where each request's tokens and blocks are in this step, the same for all layers.

    Request r owns query rows `query_start[r]:query_start[r+1]`; its first query token stands at
    position `seq_lens[r] - (query_start[r+1] - query_start[r])`. Python ints beside the tensors,
    so that CPU backends need no `.tolist()` and device backends no sync.
    """

    query_start: tuple[int, ...]
    """R + 1 entries."""
    seq_lens: tuple[int, ...]
    """R entries: context length including this step's tokens."""
    query_start_R1: torch.Tensor
    seq_lens_R: torch.Tensor
    block_tables_RN: torch.Tensor
    """int32; row r holds the request's block ids, padded with 0."""
    slot_mapping_T: torch.Tensor
    """int64; slot = block id * block_size + offset of each query token."""


class AttentionBlock(Protocol):
    """A layer's attention from its normed input to its output projection, in one call."""

    def forward(
        self,
        hidden_TD: torch.Tensor,
        cos_sin: tuple[torch.Tensor, torch.Tensor] | None,
        tensors: Mapping[str, torch.Tensor],
        kv_2NBGP: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor | None:
        """What the layer's separate calls give, bit for bit.

        Reads `qkv` (weight, bias), `attention_out.weight`, `q_norm` and `k_norm` of the unit.

        Returns:
            (T, D), or None when the weights do not lie as this needs them: nothing was done.
        """
        ...


class AttentionBackend(Protocol):
    """One implementation of paged causal attention."""

    name: str

    @staticmethod
    def why_not(spec: AttentionSpec) -> list[str]:
        """All reasons why this backend cannot run `spec`; empty when it can."""
        ...

    def block(
        self, heads: HeadShape, sliding_window: int | None, *, with_bias: bool
    ) -> AttentionBlock | None:
        """A layer's attention in one call, where this backend has that; None where not.

        Args:
            with_bias: add the output projection's bias; not for a part of a sum over ranks.
        """
        ...

    def forward(  # noqa: PLR0913 - sinks are one family's own
        self,
        query_THP: torch.Tensor,
        key_TGP: torch.Tensor,
        value_TGP: torch.Tensor,
        kv_2NBGP: torch.Tensor,
        metadata: AttentionMetadata,
        sliding_window: int | None,
        sinks_H: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write keys and values to their slots, then attend.

        Args:
            kv_2NBGP: this layer's cache, keys at index 0 and values at 1; written in place.
                Where one latent is key and value, both indices are the same memory.
            sliding_window: a query at position p sees positions > p - window; None sees all.
            sinks_H: for a spec with `sinks`, each head's score.

        Returns:
            Attention output, (T, H, P), the query's dtype.
        """
        ...
