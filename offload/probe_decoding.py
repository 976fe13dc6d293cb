"""How fast compressed records are decoded here, and whom that slows down."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch

from cluster.base.env import default_cache_dir
from cluster.base.errors import ConfigError
from offload.host_memory import block_on_demand
from offload.lossless_library import open_codec

IMAGE_BYTES = 64 << 20
"""More than caches hold: records come from the disk and not from them."""
_TRIES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRates:
    """See the fields of `Rates` of the same names."""

    decode_bytes_per_s: float
    decode_slowdown: float


def measure_decoding(num_threads: int) -> DecodeRates:
    """With one core, as a link's thread does it.

    Args:
        num_threads: that compute beside it.
    """
    try:
        codec = open_codec(default_cache_dir() / "kernels")
    except ConfigError:
        return DecodeRates(decode_bytes_per_s=0.0, decode_slowdown=0.0)
    memory = block_on_demand(IMAGE_BYTES)
    memory.view(torch.bfloat16).normal_(std=0.02)
    record = codec.encode(memory)
    assert record is not None  # two thirds of the image
    times = []
    for _ in range(_TRIES):
        memory[IMAGE_BYTES - record.numel() :] = record
        started_s = time.perf_counter()
        codec.decode(memory, record.numel())
        times.append(time.perf_counter() - started_s)
    has_own_core = len(os.sched_getaffinity(0)) > num_threads
    return DecodeRates(
        decode_bytes_per_s=IMAGE_BYTES / min(times),
        decode_slowdown=0.0 if has_own_core else 1 / num_threads,
    )
