"""How fast weights of each format are multiplied with few and with many rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from cluster.base.env import default_cache_dir
from offload.precision import Precision
from offload.probe_clock import Probe
from offload.quant_kernels import QuantKernels
from offload.rates import GemmPoint
from replicas.kernels.ops import Kernels

FORMATS = (Precision.NATIVE, Precision.INT8, Precision.INT4)
GEMM_TOKENS = (1, 16, 64, 256)
"""Kernels change their way at 16 and at 64 rows."""
LAYER_ROWS = 64
HOST_ROWS = 8
"""An expert that more rows visit is fetched, as a rule."""
WEIGHT_SHAPE = (4096, 2048)
ROUNDS = 5
"""Of all products, one after the other."""
NUM_WEIGHTS = 8
"""Together larger than the caches of a core's share, so that weights come from memory."""


def probe_weights(dtype: torch.dtype) -> list[torch.Tensor]:
    """What is multiplied with, together more than caches hold."""
    return [torch.full(WEIGHT_SHAPE, 0.01, dtype=dtype) for _ in range(NUM_WEIGHTS)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Product:
    """One product of the probe: weights of a format with so many rows."""

    kernels: Kernels
    packed: Sequence[Mapping[str, torch.Tensor]]
    input_TI: torch.Tensor

    def run(self) -> None:
        for tensors in self.packed:
            self.kernels.linear(self.input_TI, tensors, "w.weight")

    def point(self, seconds: float) -> GemmPoint:
        tokens = self.input_TI.shape[0]
        flops = 2 * tokens * math.prod(WEIGHT_SHAPE) * len(self.packed)
        return GemmPoint(tokens=tokens, flops_per_s=flops / seconds)


def measure_products(
    probe: Probe, weights: Sequence[torch.Tensor]
) -> dict[Precision, tuple[GemmPoint, ...]]:
    """The points of every format, measured in turn, round after round.

    What disturbs a machine lasts for a second or so: all tries of one point in a row would be slow
    together, and the plan would take that for the format's speed.
    """
    products = [
        (precision, _product(probe, kernels, packed, tokens))
        for precision in FORMATS
        for kernels, packed in [_packed(probe, precision, weights)]
        for tokens in GEMM_TOKENS
    ]
    best = [math.inf] * len(products)
    for _ in range(ROUNDS):
        for index, (_, product) in enumerate(products):
            best[index] = min(best[index], probe.best_s(product.run, 1))
    points: dict[Precision, tuple[GemmPoint, ...]] = dict.fromkeys(FORMATS, ())
    for (precision, product), seconds in zip(products, best, strict=True):
        points[precision] += (product.point(seconds),)
    return points


def _product(
    probe: Probe, kernels: Kernels, packed: Sequence[Mapping[str, torch.Tensor]], tokens: int
) -> _Product:
    input_TI = torch.ones((tokens, WEIGHT_SHAPE[1]), dtype=probe.dtype, device=probe.device)
    return _Product(kernels=kernels, packed=packed, input_TI=input_TI)


def _packed(
    probe: Probe, precision: Precision, weights: Sequence[torch.Tensor]
) -> tuple[Kernels, Sequence[Mapping[str, torch.Tensor]]]:
    """The weights in a format, on the device, and what multiplies them."""
    if precision is Precision.NATIVE:
        native = [probe.kernels.pack("w.weight", weight) for weight in weights]
        return probe.kernels, [probe.on_device(tensors) for tensors in native]
    kernels = QuantKernels(probe.kernels, precision, default_cache_dir() / "kernels")
    coded = kernels.quantise("w.weight", weights[0])
    # As many codes as caches do not hold; what they are does not matter.
    copies = [{name: t.clone() for name, t in coded.items()} for _ in range(2 * len(weights))]
    return kernels, [probe.on_device(tensors) for tensors in copies]


def layer_work(probe: Probe, weights: Sequence[torch.Tensor]) -> Callable[[], object]:
    """What is computed while the disk is read, where that lasts: few bytes and many rows."""
    kernels, packed = _packed(probe, Precision.INT4, weights)
    return _product(probe, kernels, packed, LAYER_ROWS).run


def host_flops_per_s(probe: Probe, weights: Sequence[torch.Tensor]) -> float:
    """What host cores make of experts beside a device; 0 where they are the device."""
    if probe.device.type == "cpu":
        return 0.0
    beside = replace(probe, device=torch.device("cpu"), kernels=probe.kernels.on_host)
    packed = [beside.kernels.pack("w.weight", weight) for weight in weights]
    product = _product(beside, beside.kernels, packed, HOST_ROWS)
    return product.point(beside.best_s(product.run)).flops_per_s
