"""Compiled arithmetic on quantised weights, in the block layout of the CPU kernels: products, and
whole weights brought back.

Built from the kernels' own headers and cached as they are (`replicas/kernels/build.py`); the torch
way in `offload/quant.py` is its oracle.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from cluster.base.errors import InternalError
from offload.precision import GROUP, Precision
from offload.quant import CodeLayout, QuantisedWeight
from replicas.kernels import build
from replicas.kernels.build import BuildPlan, KernelsUnavailableError, build_library, find_compiler

SOURCES = Path(__file__).parent / "dequant"
_ABI = 2
_P, _L, _I = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
_Call = Callable[..., None]
_QUANTISED = (Precision.INT8, Precision.INT4)
_DEPTH_BYTES = 4
"""Inputs of one row that lie side by side in the kernels' blocks."""
_SUFFIX = {torch.bfloat16: "bf16", torch.float32: "f32"}


class DequantLibrary:
    """One loaded library.

    Args:
        without_tiles: as the kernels were built whose results products have to equal.

    Raises:
        KernelsUnavailableError: it cannot be built or loaded.
    """

    def __init__(self, cache_dir: Path, *, without_tiles: bool = False) -> None:
        plan = BuildPlan(
            compiler=find_compiler(),
            sources=SOURCES,
            headers=build.SOURCES,
            without_tiles=without_tiles,
        )
        path = build_library(plan, cache_dir)
        try:
            library = ctypes.CDLL(str(path))
            if library.pk_dequant_abi() != _ABI:
                raise KernelsUnavailableError(f"{path} has another interface")
            if not library.pk_coded_start():
                raise KernelsUnavailableError("the system does not grant matrix tiles")
            library.pk_dequant_max_line.restype = _L
            self.max_line: int = library.pk_dequant_max_line()
            self._calls, self._linears = _dequantisers(library), _linears(library)
        except (OSError, AttributeError) as error:
            raise KernelsUnavailableError(f"{path} cannot be loaded ({error})") from error

    def linear(
        self,
        input_TI: torch.Tensor,
        weight: QuantisedWeight,
        bias_O: torch.Tensor | None,
        *,
        wide: bool,
    ) -> torch.Tensor:
        """input W^T + bias, (T, O); `wide`: fp32, without the rounding to the input's dtype.

        The bits are those of the CPU kernels' `linear` over the weight in the input's dtype.
        """
        (out_features, in_features), layout = weight.shape, weight.layout
        dtype = torch.float32 if wide else input_TI.dtype
        kind = (weight.precision, input_TI.dtype, dtype)
        fits = (
            input_TI.dim() == 2
            and input_TI.shape[1] == in_features
            and layout.depth * input_TI.dtype.itemsize == _DEPTH_BYTES
            and self._holds(weight.codes, weight.scales, weight.precision, layout, weight.shape)
            and (bias_O is None or (bias_O.is_contiguous() and bias_O.dtype is input_TI.dtype))
        )
        if not fits or kind not in self._linears:
            raise InternalError(
                f"{weight.precision} codes {tuple(weight.codes.shape)} do not multiply "
                f"{tuple(input_TI.shape)} of {input_TI.dtype}."
            )
        input_TI = input_TI.contiguous()
        output_TO = torch.empty((input_TI.shape[0], out_features), dtype=dtype)
        if not input_TI.shape[0]:  # matrix tiles cannot be configured for no rows
            return output_TO
        self._linears[kind](
            input_TI.data_ptr(),
            weight.codes.data_ptr(),
            weight.scales.data_ptr(),
            None if bias_O is None else bias_O.data_ptr(),
            output_TO.data_ptr(),
            input_TI.shape[0],
            out_features,
            in_features,
            GROUP // layout.depth,
            torch.get_num_threads(),
        )
        return output_TO

    def dequantise(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        out: torch.Tensor,
        precision: Precision,
        layout: CodeLayout,
    ) -> None:
        """Write whole blocks into `out`, (blocks, lines, line) of bf16 or fp32.

        Args:
            codes, scales: of the same blocks, as in `QuantisedWeight`.
        """
        blocks, lines, _ = out.shape
        shape = torch.Size((blocks * layout.width, lines * layout.depth))
        fits = (
            self._holds(codes, scales, precision, layout, shape)
            and out.shape[2] == layout.line
            and out.is_contiguous()
        )
        if not fits or (precision, out.dtype) not in self._calls:
            raise InternalError(
                f"Codes {tuple(codes.shape)} and scales {tuple(scales.shape)} do not make "
                f"{tuple(out.shape)} of {out.dtype}."
            )
        self._calls[precision, out.dtype](
            codes.data_ptr(),
            scales.data_ptr(),
            out.data_ptr(),
            blocks,
            lines,
            layout.width,
            layout.depth,
            GROUP // layout.depth,
            torch.get_num_threads(),
        )

    def _holds(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        precision: Precision,
        layout: CodeLayout,
        shape: torch.Size,
    ) -> bool:
        """Whether codes and scales are those of a weight of `shape`."""
        blocks, lines = layout.num_blocks(shape), layout.num_lines(shape)
        bits = 8 if precision is Precision.INT8 else 4
        groups = -(-lines * layout.depth // GROUP)
        return (
            tuple(codes.shape) == (blocks, lines, layout.line * bits // 8)
            and tuple(scales.shape) == (blocks, groups, 2, layout.width)
            and layout.line <= self.max_line
            and codes.dtype is torch.uint8
            and scales.dtype is torch.bfloat16
            and all(tensor.is_contiguous() and tensor.is_cpu for tensor in (codes, scales))
        )


def _dequantisers(library: ctypes.CDLL) -> Mapping[tuple[Precision, torch.dtype], _Call]:
    return {
        (precision, dtype): _function(
            library, f"pk_dequant_{precision.value}_{suffix}", [_P, _P, _P, _L, _L, _L, _L, _L, _I]
        )
        for precision in _QUANTISED
        for dtype, suffix in _SUFFIX.items()
    }


def _linears(library: ctypes.CDLL) -> Mapping[tuple[Precision, torch.dtype, torch.dtype], _Call]:
    """By format, dtype of the input and of the output."""
    kinds = {(dtype, dtype): suffix for dtype, suffix in _SUFFIX.items()}
    kinds[torch.bfloat16, torch.float32] = "bf16_f32"
    return {
        (precision, *dtypes): _function(
            library,
            f"pk_coded_linear_{precision.value}_{suffix}",
            [_P, _P, _P, _P, _P, _L, _L, _L, _L, _I],
        )
        for precision in _QUANTISED
        for dtypes, suffix in kinds.items()
    }


def _function(library: ctypes.CDLL, name: str, arguments: list[Any]) -> _Call:
    function = getattr(library, name)
    function.argtypes = arguments
    function.restype = None
    call: _Call = function
    return call
