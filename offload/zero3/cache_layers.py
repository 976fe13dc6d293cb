"""Layers of a transformers `Cache` whose keys and values lie in the engine's own KV blocks.

So scheduler, prefix cache, preemption and copy-on-write work on such a model as on any other, and
its cache is within the same budget. A layer gathers one padded batch at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from cluster.base.zero3_plan import KvLayer
from offload.zero3.padding import PaddedBatch

# Its methods have no types, which a typed class cannot build upon.
_Base: Any = CacheLayerMixin


class _PlainLayer(_Base):  # type: ignore[misc]
    """What all layers here answer the same."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the cache exists."""

    def get_max_length(self) -> int:
        """No bound of its own."""
        return -1


def cache_of(layers: Sequence[_PlainLayer]) -> Cache:
    """What a model takes as `past_key_values`."""
    members: list[Any] = list(layers)
    return Cache(layers=members)


class RecordingLayer(_PlainLayer):
    """An empty layer that remembers the shape of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.shape: tuple[int, int, int] | None = None
        """Heads, width of keys, width of values."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(R, G, S, P) keys and values, given back as they are."""
        self.shape = (key_states.shape[1], key_states.shape[-1], value_states.shape[-1])
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Empty."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of keys, and the position of the first."""
        return query_length, 0


class PagedLayer(_PlainLayer):
    """One layer of one padded batch.

    Args:
        cache_2NBGP: the layer's blocks; written by `update`.
        shape: of keys and values, at most as wide as the cache.
        batch: what is computed.
    """

    def __init__(self, cache_2NBGP: torch.Tensor, shape: KvLayer, batch: PaddedBatch) -> None:
        super().__init__()
        self._slots_2MGP = cache_2NBGP.flatten(1, 2)
        self._shape = shape
        self._batch = batch
        self.is_updated = False

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the queries' own keys and values (R, G, S, P); all of the context's come back.

        Returns:
            Keys (R, G, L, P) and values; zeros in masked columns, never what a pad computed.
        """
        self.is_updated = True
        return self._exchange(0, key_states), self._exchange(1, value_states)

    def _exchange(self, plane: int, states_RGSP: torch.Tensor) -> torch.Tensor:
        batch, width = self._batch, states_RGSP.shape[-1]
        stored_MGP = self._slots_2MGP[plane, :, :, :width]
        stored_MGP[batch.write_slots_Q] = states_RGSP[batch.row_Q, :, batch.column_Q].to(
            stored_MGP.dtype
        )
        context_RLGP = stored_MGP[batch.read_slots_RL]
        context_RLGP.masked_fill_((batch.mask_RL == 0)[:, :, None, None], 0.0)
        return context_RLGP.transpose(1, 2).to(states_RGSP.dtype)

    def get_seq_length(self) -> int:
        """Context columns before the first query column."""
        return self._batch.mask_RL.shape[1] - self._batch.token_ids_RS.shape[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of keys, and the position of the first."""
        return self._batch.mask_RL.shape[1], 0
