"""The paged KV cache tensors of one rank: allocation and block copies, nothing about contents.

One tensor (2, N, B, G, P) per layer, keys at index 0 and values at 1, or (1, N, B, 1, P) where one
latent is both. Block numbers mean the same
block in every layer and on every rank; who may write which block is the scheduler's business.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from replicas.kernels.memory import HugePages
from replicas.kernels.uploads import on_device
from replicas.worker.device import out_of_memory_as_error


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCacheSpec:
    """Shape of one rank's cache; `num_kv_heads` is local to the rank."""

    num_layers: int
    num_blocks: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    planes: int = 2

    @property
    def shape(self) -> tuple[int, ...]:
        """(planes, N, B, G, P), one layer."""
        return (self.planes, self.num_blocks, self.block_size, self.num_kv_heads, self.head_dim)

    @property
    def total_bytes(self) -> int:
        """Of all layers."""
        return self.num_layers * math.prod(self.shape) * self.dtype.itemsize


def allocate_kv_caches(spec: KvCacheSpec, device: torch.device) -> list[torch.Tensor]:
    """One zeroed cache per layer.

    Zeroed, because a backend may read the unused end of a block and multiply it by zero, which
    a leftover NaN would survive.

    Raises:
        DeviceOutOfMemoryError: the device cannot hold it.
    """
    with out_of_memory_as_error(f"allocating {spec.num_blocks} KV cache blocks"):
        if device.type == "cpu":
            pages = HugePages()
            return [pages.zeros(spec.shape, spec.dtype) for _ in range(spec.num_layers)]
        return [
            torch.zeros(spec.shape, dtype=spec.dtype, device=device) for _ in range(spec.num_layers)
        ]


def copy_blocks(kv_caches: Sequence[torch.Tensor], block_copies: Sequence[tuple[int, int]]) -> None:
    """Copy (source, target) blocks in all layers, as if one after another in the order given.

    Args:
        kv_caches: (2, N, B, G, P) per layer; written in place.
    """
    for run in _independent_runs(block_copies):
        device = kv_caches[0].device
        sources, targets = on_device(np.array(run, np.int64), device).unbind(1)
        for cache_2NBGP in kv_caches:
            cache_2NBGP.index_copy_(1, targets, cache_2NBGP.index_select(1, sources))


def _independent_runs(
    block_copies: Sequence[tuple[int, int]],
) -> Iterator[list[tuple[int, int]]]:
    """Split copies into runs that may be done at once: nothing is read or written after a write.

    A run gathers all sources before it writes, so overwriting an earlier source is harmless.
    """
    run: list[tuple[int, int]] = []
    written: set[int] = set()
    for source, target in block_copies:
        if source in written or target in written:
            yield run
            run, written = [], set()
        run.append((source, target))
        written.add(target)
    if run:
        yield run
