"""The compiled dequantiser: codes straight into the block layout of the CPU kernels.

Built and cached as the kernels themselves are (`replicas/kernels/build.py`); the torch way in
`offload/quant.py` is its oracle.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

from cluster.base.errors import InternalError
from offload.precision import GROUP, Precision
from offload.quant import CodeLayout
from replicas.kernels.build import BuildPlan, KernelsUnavailableError, build_library, find_compiler

SOURCES = Path(__file__).parent / "dequant"
_ABI = 1
_P, _L, _I = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
_SUFFIX = {torch.bfloat16: "bf16", torch.float32: "f32"}


class DequantLibrary:
    """One loaded library.

    Raises:
        KernelsUnavailableError: it cannot be built or loaded.
    """

    def __init__(self, cache_dir: Path) -> None:
        path = build_library(BuildPlan(compiler=find_compiler(), sources=SOURCES), cache_dir)
        try:
            library = ctypes.CDLL(str(path))
            if library.pk_dequant_abi() != _ABI:
                raise KernelsUnavailableError(f"{path} has another interface")
            library.pk_dequant_max_line.restype = _L
            self.max_line: int = library.pk_dequant_max_line()
            self._calls = {
                (precision, dtype): _function(library, f"pk_dequant_{precision.value}_{suffix}")
                for precision in (Precision.INT8, Precision.INT4)
                for dtype, suffix in _SUFFIX.items()
            }
        except (OSError, AttributeError) as error:
            raise KernelsUnavailableError(f"{path} cannot be loaded ({error})") from error

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
        blocks, lines, line = out.shape
        group_lines = GROUP // layout.depth
        groups = -(-lines // group_lines)
        bits = 8 if precision is Precision.INT8 else 4
        fits = (
            tuple(codes.shape) == (blocks, lines, line * bits // 8)
            and tuple(scales.shape) == (blocks, groups, 2, layout.width)
            and line == layout.line <= self.max_line
            and codes.dtype == torch.uint8
            and scales.dtype == torch.bfloat16
            and all(tensor.is_contiguous() and tensor.is_cpu for tensor in (codes, scales, out))
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
            group_lines,
            torch.get_num_threads(),
        )


def _function(library: ctypes.CDLL, name: str) -> Callable[..., None]:
    function = getattr(library, name)
    function.argtypes = [_P, _P, _P, _L, _L, _L, _L, _L, _I]
    function.restype = None
    call: Callable[..., None] = function
    return call
