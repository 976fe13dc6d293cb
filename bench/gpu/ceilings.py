"""What the device can do, measured in the same run: read, multiply, take copies from the host."""

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
    """The better of two rates: summing a large tensor, copying it (which reads and writes)."""
    data = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(data)
    summed = num_bytes / seconds(data.sum, device, repeats)
    copied = 2 * num_bytes / seconds(lambda: target.copy_(data), device, repeats)
    return max(summed, copied)


def matmul_flops_per_s(
    device: torch.device, dtype: torch.dtype, size: int, repeats: int = 20
) -> float:
    """Rate of a square multiplication."""
    left = torch.randn(size, size, device=device, dtype=torch.float32).to(dtype)
    right = torch.randn(size, size, device=device, dtype=torch.float32).to(dtype)
    return 2 * size**3 / seconds(lambda: left @ right, device, repeats)


def fp8_flops_per_s(device: torch.device, size: int, repeats: int = 20) -> float:
    """Rate of a square multiplication of e4m3 codes with a scale per row; CUDA only."""
    codes = torch.ones((size, size), device=device).to(torch.float8_e4m3fn)
    scales = torch.ones((size, 1), device=device)

    def multiply() -> torch.Tensor:
        return torch._scaled_mm(
            codes, codes.t(), scale_a=scales, scale_b=scales.t(), out_dtype=torch.bfloat16
        )

    return 2 * size**3 / seconds(multiply, device, repeats)


def host_to_device_bytes_per_s(device: torch.device, num_bytes: int, repeats: int = 10) -> float:
    """Rate of one large copy from pinned memory."""
    source = torch.zeros(num_bytes, dtype=torch.uint8)
    if device.type == "cuda":
        source = source.pin_memory()
    target = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    return num_bytes / seconds(lambda: target.copy_(source, non_blocking=True), device, repeats)
