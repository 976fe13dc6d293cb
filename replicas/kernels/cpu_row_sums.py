"""The compiled way home of partial sums; see `moe.row_sums`, which it equals to the bit."""

from __future__ import annotations

import ctypes

import torch

from cluster.base.errors import InternalError
from replicas.kernels.loader import CpuLibrary

_P, _L, _I = ctypes.c_void_p, ctypes.c_long, ctypes.c_int


class CpuRowSums:
    """Implements `RowSums`: one pass over the rows each way."""

    def __init__(self, library: CpuLibrary) -> None:
        self._pack = library.function("pk_pack_sums", [_P, _P, _L, _L, _I])
        self._add = library.function("pk_add_sums", [_P, _P, _P, _L, _L, _I])

    def pack(self, sums_AD: torch.Tensor) -> torch.Tensor:
        """See `RowSums.pack`."""
        _check(sums_AD, torch.float64, dim=2)
        num_rows, dim = sums_AD.shape
        packed_AX = torch.empty((num_rows, 1 + dim), dtype=torch.int32)
        threads = torch.get_num_threads()
        self._pack(sums_AD.data_ptr(), packed_AX.data_ptr(), num_rows, dim, threads)
        return packed_AX

    def add(self, packed_RX: torch.Tensor, row_R: torch.Tensor, sums_TD: torch.Tensor) -> None:
        """See `RowSums.add`.

        Raises:
            InternalError: the tensors do not fit each other.
        """
        _check(packed_RX, torch.int32, dim=2)
        _check(row_R, torch.int64, dim=1)
        _check(sums_TD, torch.float64, dim=2)
        num_rows, dim = row_R.numel(), sums_TD.shape[1]
        if packed_RX.shape != (num_rows, 1 + dim):
            raise InternalError(
                f"{num_rows} sums of width {dim} do not lie in {tuple(packed_RX.shape)}."
            )
        threads = torch.get_num_threads()
        self._add(
            packed_RX.data_ptr(), row_R.data_ptr(), sums_TD.data_ptr(), num_rows, dim, threads
        )


def _check(tensor: torch.Tensor, dtype: torch.dtype, *, dim: int) -> None:
    if tensor.dtype != dtype or tensor.dim() != dim or not tensor.is_contiguous():
        raise InternalError(
            f"Sums got a {tensor.dtype} tensor of shape {tuple(tensor.shape)} and strides "
            f"{tensor.stride()}."
        )
