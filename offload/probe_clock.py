"""What a probe measures with: a device, kernels and a clock that knows when the device is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from replicas.kernels.ops import Kernels
from replicas.worker.device import synchronize

SWEPT_BYTES = 64 << 20
"""Written to empty the caches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What is measured with."""

    device: torch.device
    dtype: torch.dtype
    kernels: Kernels

    def on_device(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies where the device computes; what only tells a shape stays."""
        return {
            name: tensor if tensor.is_meta else tensor.to(self.device)
            for name, tensor in tensors.items()
        }

    def best_s(self, work: Callable[[], object], tries: int = 3) -> float:
        """Shortest time of `work`, after one run that warms up."""
        work()
        synchronize(self.device)
        times = []
        for _ in range(tries):
            started_s = time.perf_counter()
            work()
            synchronize(self.device)
            times.append(time.perf_counter() - started_s)
        return min(times)

    def cold_s(self, work: Callable[[], object], tries: int) -> float:
        """As `best_s`, with caches that hold something else, as weights do between two layers."""
        others = torch.ones(SWEPT_BYTES, dtype=torch.uint8, device=self.device)

        def time_one() -> float:
            others.add_(1)
            synchronize(self.device)
            started_s = time.perf_counter()
            work()
            synchronize(self.device)
            return time.perf_counter() - started_s

        work()
        return min(time_one() for _ in range(tries))
