"""The compiled sampler: tokens of many rows in one call; the oracle: `sampling.filters`."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt
import torch

from cluster.base.errors import InternalError
from replicas.kernels.loader import CpuLibrary

_P, _L, _I = ctypes.c_void_p, ctypes.c_long, ctypes.c_int

WISHES = np.dtype(
    [
        ("peak", np.float32),
        ("divisor", np.float32),
        ("top_k", np.int64),
        ("top_p", np.float64),
        ("min_p", np.float32),
        ("uniform", np.float64),
    ],
    align=True,
)
"""The C side's `Wish`: what a row wants; 0, 1 and 0 leave out top-k, top-p and min-p."""
_MOST_TOKENS = 1 << 31


class CpuDraws:
    """Draws tokens; every one it gives is the one that the torch functions give."""

    def __init__(self, library: CpuLibrary) -> None:
        self._sample = library.function("pk_sample_f32", [_P, _L, _L, _P, _P, _L, _P, _I])

    def draw(
        self,
        logits_RV: torch.Tensor,
        rows_K: npt.NDArray[np.int64],
        wishes_K: npt.NDArray[np.void],
    ) -> npt.NDArray[np.int64]:
        """Tokens of some rows, (K,); -1 where rounding could decide and torch has to.

        Args:
            logits_RV: fp32, the values of a row side by side.
            wishes_K: of `WISHES`.

        Raises:
            InternalError: the arrays are not such.
        """
        num_rows, vocab_size = logits_RV.shape
        fits = (
            logits_RV.dtype == torch.float32
            and logits_RV.stride(1) == 1
            and logits_RV.is_cpu
            and 0 < vocab_size < _MOST_TOKENS
            and wishes_K.dtype == WISHES
            and len(wishes_K) == len(rows_K)
            and rows_K.dtype == np.int64
        )
        if not fits or (len(rows_K) and not 0 <= rows_K.min() <= rows_K.max() < num_rows):
            raise InternalError(
                f"{len(rows_K)} rows of {logits_RV.dtype} logits {tuple(logits_RV.shape)} cannot "
                f"be drawn from with {len(wishes_K)} entries of {wishes_K.dtype}."
            )
        rows_K, wishes_K = np.ascontiguousarray(rows_K), np.ascontiguousarray(wishes_K)
        tokens_K = np.empty(len(rows_K), np.int64)
        self._sample(
            logits_RV.data_ptr(),
            vocab_size,
            logits_RV.stride(0),
            rows_K.ctypes.data,
            wishes_K.ctypes.data,
            len(rows_K),
            tokens_K.ctypes.data,
            torch.get_num_threads(),
        )
        return tokens_K
