"""What the device can do, measured in the same run: reading its memory, multiplying matrices."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from replicas.worker.device import synchronize

_WARM_UP = 3


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of `work`, the device idle before and after."""
    for _ in range(_WARM_UP):
        work()
    times = []
    for _ in range(repeats):
        synchronize(device)
        started_s = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - started_s)
    return sorted(times)[len(times) // 2]


def read_bytes_per_s(device: torch.device, num_bytes: int, repeats: int = 20) -> float:
    """Rate of reading a large tensor once (a sum: nothing is written)."""
    data = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    return num_bytes / seconds(data.sum, device, repeats)


def matmul_flops_per_s(
    device: torch.device, dtype: torch.dtype, size: int, repeats: int = 20
) -> float:
    """Rate of a square multiplication."""
    left = torch.randn(size, size, device=device, dtype=torch.float32).to(dtype)
    right = torch.randn(size, size, device=device, dtype=torch.float32).to(dtype)
    return 2 * size**3 / seconds(lambda: left @ right, device, repeats)
