"""What a further micro-batch takes of a layer, and what passing its keys and values through costs.

A layer's first micro-batch finds caches as cold as the weights leave them; the next ones find its
code and small tensors there. Windows are those that a replica uses, with their thread.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from offload.kv_windows import KvWindows, WindowPart
from offload.probe_clock import Probe
from offload.probe_rows import BLOCK_SIZE, HEAD_DIM, NUM_KV_HEADS
from replicas.attention.backend import AttentionMetadata

NUM_BLOCKS = 1024
"""Of a large window; together with as many of the cache more than what cores keep near."""
TRIES = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class PartRates:
    """Measured of micro-batches."""

    layer_s: float
    """For a layer and each of its micro-batches but the first, with one row."""
    window_s: float
    """For a layer and each micro-batch whose keys and values pass through a window, if few."""
    copy_bytes_per_s: float
    """Of keys and values into a window; 0: a device's are not copied by its host's cores."""


def measure_parts(probe: Probe, layer: Callable[[], object]) -> PartRates:
    """Times a layer again and again, and with windows beside it.

    Args:
        layer: calls what a layer calls, with one row and next to no weights.
    """
    warm_s = probe.best_s(layer, TRIES)
    if probe.device.type != "cpu":
        return PartRates(layer_s=warm_s, window_s=0.0, copy_bytes_per_s=0.0)
    shape = (2, 2 * NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    cache = torch.ones(shape, dtype=probe.dtype)
    windows = KvWindows([cache], 2, NUM_BLOCKS)
    try:
        alone_s = _usual_s(probe, layer)
        few_s, many_s = (
            _usual_s(probe, _through(windows, layer, count)) for count in (1, NUM_BLOCKS)
        )
    finally:
        windows.close()
    num_bytes = (NUM_BLOCKS - 1) * cache[:, 0].nbytes
    return PartRates(
        layer_s=warm_s,
        window_s=max(0.0, few_s - alone_s),
        copy_bytes_per_s=num_bytes / max(1e-9, many_s - few_s),
    )


def _usual_s(probe: Probe, work: Callable[[], object]) -> float:
    """The median, as handing over to a thread takes now this long and now that."""
    return statistics.median(probe.cold_s(work, 1) for _ in range(TRIES))


def _through(windows: KvWindows, layer: Callable[[], object], count: int) -> Callable[[], object]:
    """Loads so many blocks, computes and stores the last of them."""
    blocks = np.random.default_rng(0).permutation(2 * NUM_BLOCKS)[:count].astype(np.int64)
    nothing = torch.zeros(0, dtype=torch.int32)
    part = WindowPart(
        metadata=AttentionMetadata(
            query_start=(0,),
            seq_lens=(),
            query_start_R1=nothing,
            seq_lens_R=nothing,
            block_tables_RN=nothing,
            slot_mapping_T=nothing,
        ),
        blocks=blocks,
        written=np.array([count - 1]),
    )

    def run() -> None:
        windows.load(0, part, 0)
        windows.loaded(0)
        layer()
        windows.store(0, part, 0)
        windows.finish()

    return run
