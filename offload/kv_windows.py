"""Windows onto a KV cache in host memory: the blocks of one micro-batch and layer at a time.

    cache of a layer, host   | 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 | ...
    blocks of a micro-batch    2, 5, 6                          load: gathered, in this order
    window, device           | 2 | 5 | 6 |   |                  computed with as blocks 0, 1, 2
    blocks it has written      6                                store: scattered back

One thread copies, in the order in which copies are asked for, beside the computation. So a window
may be asked to load as soon as its store has been, and what one micro-batch has stored the next one
loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.base.errors import InternalError
from offload.link import POISON
from replicas.attention.backend import AttentionMetadata
from replicas.kernels.memory import HugePages

Bytes = NDArray[np.uint8]
Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowPart:
    """A micro-batch as it computes in a window, and its blocks there."""

    metadata: AttentionMetadata
    """With block ids of the window."""
    blocks: Indices
    """The cache's block behind each of the window's."""
    written: Indices
    """Blocks of the window that this step's keys and values go to."""


def in_window(part: AttentionMetadata, block_size: int) -> WindowPart:
    """The micro-batch with its blocks side by side, each once whoever shares it."""
    tables_RN = part.block_tables_RN.numpy().astype(np.int64)
    lengths_R1 = -(-np.array(part.seq_lens, np.int64) // block_size)[:, None]
    is_used_RN = np.arange(tables_RN.shape[1])[None, :] < lengths_R1
    blocks = np.unique(tables_RN[is_used_RN])
    # Padding of a table is never looked at; it has to be a block all the same.
    local_RN = np.where(is_used_RN, np.searchsorted(blocks, tables_RN), 0).astype(np.int32)
    slots_T = part.slot_mapping_T.numpy()
    local_T = np.searchsorted(blocks, slots_T // block_size)
    return WindowPart(
        metadata=replace(
            part,
            block_tables_RN=torch.from_numpy(local_RN),
            slot_mapping_T=torch.from_numpy(local_T * block_size + slots_T % block_size),
        ),
        blocks=blocks,
        written=np.unique(local_T),
    )


@dataclass(slots=True, kw_only=True)
class WindowStats:
    """What the windows have cost since they were made."""

    loaded_bytes: int = 0
    stored_bytes: int = 0


class KvWindows:
    """Windows of a CPU rank, whose device is a budget of its own in the same memory.

    Args:
        caches: (planes, N, B, G, P) of each layer, in host memory.
        num_windows: micro-batches that are loading, computing or being stored at one time.
        num_blocks: of one window.
        poison: overwrite what was stored with NaN, so that a use before loading shows.
    """

    def __init__(
        self,
        caches: Sequence[torch.Tensor],
        num_windows: int,
        num_blocks: int,
        *,
        poison: bool = False,
    ) -> None:
        planes, _, self.block_size, *rest = caches[0].shape
        shape = (planes, num_blocks, self.block_size, *rest)
        pages = HugePages()
        self.num_blocks = num_blocks
        self.stats = WindowStats()
        self._poison = poison
        self._caches = [_bytes(cache) for cache in caches]
        self._windows = [pages.zeros(shape, caches[0].dtype) for _ in range(num_windows)]
        self._window_bytes = [_bytes(window) for window in self._windows]
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="kv-windows")
        self._loads: dict[int, Future[None]] = {}
        self._stores: list[Future[None]] = []

    def __len__(self) -> int:
        return len(self._windows)

    def load(self, layer: int, part: WindowPart, window: int) -> None:
        """Start to fill the window with the micro-batch's blocks of the layer.

        Raises:
            InternalError: they are more than a window holds.
        """
        if len(part.blocks) > self.num_blocks:
            raise InternalError(
                f"A micro-batch has {len(part.blocks)} blocks, a window {self.num_blocks}."
            )
        self._loads[window] = self._copier.submit(self._load, layer, part, window)

    def loaded(self, window: int) -> torch.Tensor:
        """The window, (planes, blocks, B, G, P), once it holds what was asked for."""
        self._loads.pop(window).result()
        return self._windows[window]

    def store(self, layer: int, part: WindowPart, window: int) -> None:
        """Start to write back what the micro-batch has written; the window is free."""
        self._stores.append(self._copier.submit(self._store, layer, part, window))

    def finish(self) -> None:
        """Return when the cache holds everything that was stored."""
        stores, self._stores = self._stores, []
        for store in stores:
            store.result()

    def abandon(self) -> None:
        """Return when nothing is copied any more, whatever became of it."""
        wait([*self._loads.values(), *self._stores])
        self._loads.clear()
        self._stores.clear()

    def close(self) -> None:
        """End the thread; safe to call twice."""
        self._copier.shutdown(wait=True, cancel_futures=True)

    def _load(self, layer: int, part: WindowPart, window: int) -> None:
        count = len(part.blocks)
        for source, target in zip(self._caches[layer], self._window_bytes[window], strict=True):
            np.take(source, part.blocks, axis=0, out=target[:count], mode="clip")
            self.stats.loaded_bytes += count * source.shape[1]

    def _store(self, layer: int, part: WindowPart, window: int) -> None:
        blocks = part.blocks[part.written]
        for target, source in zip(self._caches[layer], self._window_bytes[window], strict=True):
            target[blocks] = source[part.written]
            self.stats.stored_bytes += len(blocks) * target.shape[1]
        if self._poison:
            self._window_bytes[window].fill(POISON)


def _bytes(cache: torch.Tensor) -> Bytes:
    """The same memory as (planes, blocks, bytes of a block)."""
    planes, blocks = cache.shape[:2]
    array: Bytes = cache.view(torch.uint8).numpy()
    return array.reshape(planes, blocks, -1)
