"""What a machine was measured to do: bytes and operations per second. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offload.precision import Precision


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmPoint:
    """How fast weights are multiplied with so many rows at once."""

    tokens: int
    flops_per_s: float

    @property
    def seconds_per_weight(self) -> float:
        """Time of one weight's 2 x tokens operations."""
        return 2 * self.tokens / self.flops_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What a machine was measured to do, alone and undisturbed."""

    disk_bytes_per_s: float
    link_bytes_per_s: float
    """From host memory into a slot of the device; on a CPU replica a copy in memory."""
    memory_bytes_per_s: float
    """Reading the device's own memory."""
    gemm: tuple[GemmPoint, ...]
    """By increasing `tokens`, with weights that no cache holds."""
    int8_gemm: tuple[GemmPoint, ...]
    int4_gemm: tuple[GemmPoint, ...]
    """The same with quantised weights, which the device brings back on the way."""
    host_memory_bytes_per_s: float = 0.0
    """Reading host memory by host cores; 0: not measured."""
    compute_lost_to_reads: float = 0.0
    """Share of the computation that is lost while the disk is read, where the host computes."""
    host_flops_per_s: float = 0.0
    """Products of weights with few rows by host cores beside a device; 0: not measured."""
    device_is_host: bool = False
    """Copies of keys and values, and attention to those in host memory, take the time of the very
    cores that compute."""
    layer_overhead_s: float = 0.0
    """What a layer takes beside its matrices: launching, norms, bookkeeping."""
    part_overhead_s: float = 0.0
    """The same for each micro-batch but the first, which finds the layer's code in the caches; 0:
    as much."""
    kv_window_s: float = 0.0
    """What a layer takes for each micro-batch whose keys and values pass through a window."""
    kv_copy_bytes_per_s: float = 0.0
    """Of keys and values into a window by the host's cores; 0: as fast as the link."""
    row_value_s: float = 0.0
    """What each further row takes, for each value that passes through (`layer_values`)."""
    attention_bytes_per_s: float = 0.0
    """Of keys and values, by what computes attention over them; 0: as fast as memory is read."""
    decode_bytes_per_s: float = 0.0
    """Of what compressed records decode to, by one core; 0: they cannot be decoded."""
    decode_slowdown: float = 0.0
    """Seconds that a second of decoding takes from what computes: 0 with a core to itself."""

    def gemm_s(self, weights: float, tokens: int, precision: Precision = Precision.NATIVE) -> float:
        """Seconds to multiply `weights` weights of a format with `tokens` rows.

        Time per weight is linear between measured points, flat below the first (reading the
        weight is all it takes) and at the last point's rate above it.
        """
        if not tokens:
            return 0.0
        points = {
            Precision.NATIVE: self.gemm,
            Precision.INT8: self.int8_gemm,
            Precision.INT4: self.int4_gemm,
        }
        return weights * _interpolate(points[precision], tokens)


def _interpolate(points: Sequence[GemmPoint], tokens: int) -> float:
    below, *rest = points
    if tokens <= below.tokens:
        return below.seconds_per_weight
    for above in rest:
        if tokens <= above.tokens:
            part = (tokens - below.tokens) / (above.tokens - below.tokens)
            low, high = below.seconds_per_weight, above.seconds_per_weight
            return low + part * (high - low)
        below = above
    return 2 * tokens / below.flops_per_s
