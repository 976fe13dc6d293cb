"""Kernels over quantised weights: bring a panel back, multiply, next panel.

Wraps the kernels that a model was given; everything but `linear` with a quantised weight goes
straight to them. With the compiled kernels a panel stays in the processor's cache until it is used,
so a quantised weight is never in memory whole in the wide format. A row's result is the one that
the wrapped kernels give for the dequantised weight, bit for bit.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.base.errors import InternalError
from moe.experts import GroupedExperts
from moe.spec import GateSpec
from offload.dequant_library import DequantLibrary
from offload.packers import layout_digest
from offload.precision import NEVER_QUANTISED, Precision
from offload.quant import (
    ROWS,
    SCALES,
    CodeLayout,
    QuantisedWeight,
    codes_suffix,
    dequantise,
    quantise,
)
from replicas.kernels.build import KernelsUnavailableError
from replicas.kernels.cpu_ops import CpuKernels
from replicas.kernels.expert_ops import ExpertSet
from replicas.kernels.ops import HeadShape, HeadTensors, Kernels, MlpNames
from replicas.kernels.torch_ops import silu_mlp_in_steps

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRows:
    """The compiled way: blocks of the wrapped kernels' own layout."""

    library: DequantLibrary
    width: int
    """Rows of a block."""


class QuantKernels:
    """Implements `Kernels`.

    Args:
        base: the model's kernels.
        precision: of the weights that arrive quantised.
        cache_dir: where the compiled dequantiser is kept.
    """

    def __init__(self, base: Kernels, precision: Precision, cache_dir: Path) -> None:
        self.base = base
        self._precision = precision
        self._cache_dir = cache_dir
        self._packed = _packed_rows(base, cache_dir)
        self.name = f"{base.name}+{precision.value}" + ("" if self._packed else " in rows")

    @property
    def on_host(self) -> QuantKernels:
        """See `Kernels.on_host`; codes lie there as they do here."""
        if self.base.on_host is self.base:
            return self
        return QuantKernels(self.base.on_host, self._precision, self._cache_dir)

    def layout(self, dtype: torch.dtype) -> CodeLayout:
        """How codes of a weight in `dtype` must lie for these kernels."""
        if self._packed is None:
            return ROWS
        return CodeLayout(width=self._packed.width, depth=4 // dtype.itemsize)

    def quantise(self, name: str, weight_OI: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors that stand for the linear weight `name` in a streamed unit.

        A weight that the layout cannot hold stays as the wrapped kernels pack it.
        """
        layout = self.layout(weight_OI.dtype)
        if layout.why_not(weight_OI.shape):
            return self.base.pack(name, weight_OI)
        quantised = quantise(weight_OI, self._precision, layout)
        return {
            name: torch.empty(weight_OI.shape, dtype=weight_OI.dtype, device="meta"),
            name + codes_suffix(self._precision): quantised.codes,
            name + SCALES: quantised.scales,
        }

    def linear(
        self,
        input_TI: torch.Tensor,
        tensors: Mapping[str, torch.Tensor],
        name: str,
        bias_O: torch.Tensor | None = None,
        *,
        wide: bool = False,
    ) -> torch.Tensor:
        """See `Kernels.linear`."""
        codes = tensors.get(name + codes_suffix(self._precision))
        if codes is None:
            return self.base.linear(input_TI, tensors, name, bias_O, wide=wide)
        like = tensors[name]
        weight = QuantisedWeight(
            precision=self._precision,
            layout=self.layout(like.dtype),
            shape=like.shape,
            codes=codes,
            scales=tensors[name + SCALES],
        )
        if self._packed is not None:
            return self._packed.library.linear(input_TI, weight, bias_O, wide=wide)
        plain = {name: dequantise(weight, like.dtype)}
        return self.base.linear(input_TI, plain, name, bias_O, wide=wide)

    # Everything else is the wrapped kernels'.

    def pack(self, name: str, weight_OI: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `Kernels.pack`: weights that stay in memory are not quantised."""
        return self.base.pack(name, weight_OI)

    def embedding(
        self, ids_T: torch.Tensor, tensors: Mapping[str, torch.Tensor], name: str
    ) -> torch.Tensor:
        """See `Kernels.embedding`."""
        return self.base.embedding(ids_T, tensors, name)

    def rms_norm(self, hidden: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        """See `Kernels.rms_norm`."""
        return self.base.rms_norm(hidden, weight_D, eps)

    def add_rms_norm(
        self, hidden_TD: torch.Tensor, delta_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Kernels.add_rms_norm`."""
        return self.base.add_rms_norm(hidden_TD, delta_TD, weight_D, eps)

    def prepare_heads(
        self, fused_TX: torch.Tensor, shape: HeadShape, tensors: HeadTensors
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `Kernels.prepare_heads`."""
        return self.base.prepare_heads(fused_TX, shape, tensors)

    def silu_mul(self, gate_up_TF: torch.Tensor) -> torch.Tensor:
        """See `Kernels.silu_mul`."""
        return self.base.silu_mul(gate_up_TF)

    def gelu(self, input_TF: torch.Tensor, *, with_tanh: bool) -> torch.Tensor:
        """See `Kernels.gelu`."""
        return self.base.gelu(input_TF, with_tanh=with_tanh)

    def silu_mlp(
        self, input_TD: torch.Tensor, tensors: Mapping[str, torch.Tensor], names: MlpNames
    ) -> torch.Tensor:
        """See `Kernels.silu_mlp`; step by step, as the weights may be quantised."""
        return silu_mlp_in_steps(self, input_TD, tensors, names)

    def route(
        self, logits_TE: torch.Tensor, spec: GateSpec, bias_E: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Kernels.route`."""
        return self.base.route(logits_TE, spec, bias_E)

    def experts(self, experts: ExpertSet) -> GroupedExperts | None:
        """See `Kernels.experts`; one by one, as the weights may be quantised."""
        return None


class QuantPacker:
    """A `Packer`: codes for the layers' linear weights; embedding and head stay native."""

    def __init__(self, kernels: QuantKernels, dtype: torch.dtype) -> None:
        self._kernels = kernels
        digest = layout_digest(kernels.name, lambda probe: kernels.quantise("", probe), dtype)
        self.layout = " ".join((digest, *NEVER_QUANTISED))

    def pack(self, unit: str, name: str, weight_OI: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """See `Packer`."""
        if unit.startswith("layer.") and name not in NEVER_QUANTISED:
            return self._kernels.quantise("", weight_OI)
        return self._kernels.pack("", weight_OI)


def _packed_rows(base: Kernels, cache_dir: Path) -> PackedRows | None:
    """The compiled way when the base is compiled too and lays weights out as expected."""
    if not isinstance(base, CpuKernels):
        return None
    layout = CodeLayout(width=base.library.width, depth=2)
    sample = torch.arange(layout.width * 6, dtype=torch.float32).view(-1, 6).bfloat16()
    if not torch.equal(base.library.pack(sample).flatten(), layout.arrange(sample).flatten()):
        raise InternalError("The CPU kernels lay weights out in a way the dequantiser cannot.")
    try:
        without_tiles = not base.library.isa.startswith("amx")
        library = DequantLibrary(cache_dir, without_tiles=without_tiles)
    except KernelsUnavailableError as error:
        _log.warning("quantised weights: torch dequantises them, because %s", error)
        return None
    return PackedRows(library=library, width=layout.width)
