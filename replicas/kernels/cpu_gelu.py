"""The compiled GELU, whose values' bits do not depend on where in a tensor they stand.

Torch's do: what is left over behind the last vector of a thread's part goes another way.
"""

from __future__ import annotations

import ctypes

import torch

from cluster.base.errors import InternalError
from replicas.kernels.cpu_calls import SUFFIX
from replicas.kernels.loader import CpuLibrary

_P, _L, _I = ctypes.c_void_p, ctypes.c_long, ctypes.c_int


class CpuGelu:
    """GELU by its error function, or by tanh."""

    def __init__(self, library: CpuLibrary) -> None:
        self._calls = {
            dtype: library.function(f"pk_gelu_{suffix}", [_P, _P, _L, _L, _I, _I])
            for dtype, suffix in SUFFIX.items()
        }

    def forward(self, input_TF: torch.Tensor, *, with_tanh: bool) -> torch.Tensor:
        """See `Kernels.gelu`.

        Raises:
            InternalError: the tensor is not a plain one of a dtype that the library knows.
        """
        call = self._calls.get(input_TF.dtype)
        if call is None or input_TF.dim() != 2 or not input_TF.is_contiguous():
            raise InternalError(
                f"The compiled GELU got a {input_TF.dtype} tensor {tuple(input_TF.shape)} with "
                f"strides {input_TF.stride()}."
            )
        output_TF = torch.empty_like(input_TF)
        num_rows, width = input_TF.shape
        call(
            input_TF.data_ptr(),
            output_TF.data_ptr(),
            num_rows,
            width,
            with_tanh,
            torch.get_num_threads(),
        )
        return output_TF
