"""The compiled way home of partial sums; see `moe.row_sums`, which it equals to the bit."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from cluster.base.errors import InternalError
from replicas.kernels.loader import CpuLibrary

_P, _L, _I = ctypes.c_void_p, ctypes.c_long, ctypes.c_int


class CpuRowSums:
    """Implements `RowSums`: one pass over the rows each way, and one where sums are passed on."""

    def __init__(self, library: CpuLibrary) -> None:
        self._pack = library.function("pk_pack_sums", [_P, _P, _L, _L, _I], _I)
        self._add = library.function("pk_add_sums", [_P, _P, _P, _L, _L, _I])
        self._join = library.function("pk_join_sums", [_P, _P, _L, _P, _L, _L, _P, _P, _I], _I)

    def pack(self, sums_AD: torch.Tensor, into_AX: torch.Tensor) -> bool:
        """See `RowSums.pack`.

        Raises:
            InternalError: the tensors do not fit each other.
        """
        _check(sums_AD, torch.float64, dim=2)
        _check(into_AX, torch.int32, dim=2)
        num_rows, dim = sums_AD.shape
        _check_packed(into_AX, num_rows, dim)
        threads = torch.get_num_threads()
        return bool(self._pack(sums_AD.data_ptr(), into_AX.data_ptr(), num_rows, dim, threads))

    def add(self, packed_RX: torch.Tensor, row_R: torch.Tensor, sums_TD: torch.Tensor) -> None:
        """See `RowSums.add`.

        Raises:
            InternalError: the tensors do not fit each other.
        """
        _check(packed_RX, torch.int32, dim=2)
        _check(row_R, torch.int64, dim=1)
        _check(sums_TD, torch.float64, dim=2)
        num_rows, dim = row_R.numel(), sums_TD.shape[1]
        _check_packed(packed_RX, num_rows, dim)
        threads = torch.get_num_threads()
        self._add(
            packed_RX.data_ptr(), row_R.data_ptr(), sums_TD.data_ptr(), num_rows, dim, threads
        )

    def join(
        self, pieces: Sequence[torch.Tensor], row_R: torch.Tensor, into_TX: torch.Tensor
    ) -> bool:
        """See `RowSums.join`.

        Raises:
            InternalError: the tensors do not fit each other.
        """
        _check(into_TX, torch.int32, dim=2)
        num_rows, width = into_TX.shape
        return self._joined(pieces, row_R, (num_rows, width - 1), into_TX.data_ptr(), None)

    def total(
        self, pieces: Sequence[torch.Tensor], row_R: torch.Tensor, into_TD: torch.Tensor
    ) -> bool:
        """See `RowSums.total`.

        Raises:
            InternalError: the tensors do not fit each other.
        """
        _check(into_TD, torch.float32, dim=2)
        num_rows, dim = into_TD.shape
        return self._joined(pieces, row_R, (num_rows, dim), None, into_TD.data_ptr())

    def _joined(
        self,
        pieces: Sequence[torch.Tensor],
        row_R: torch.Tensor,
        shape: tuple[int, int],
        packed: int | None,
        rounded: int | None,
    ) -> bool:
        num_rows, dim = shape
        _check(row_R, torch.int64, dim=1)
        counts = [piece.shape[0] for piece in pieces]
        for piece, count in zip(pieces, counts, strict=True):
            _check(piece, torch.int32, dim=2)
            _check_packed(piece, count, dim)
        if sum(counts) != row_R.numel():
            raise InternalError(f"{sum(counts)} sums do not belong to {row_R.numel()} rows.")
        return not self._join(
            (_P * len(pieces))(*[piece.data_ptr() for piece in pieces]),
            (ctypes.c_int64 * len(pieces))(*counts),
            len(pieces),
            row_R.data_ptr(),
            num_rows,
            dim,
            packed,
            rounded,
            torch.get_num_threads(),
        )


def _check_packed(packed: torch.Tensor, num_rows: int, dim: int) -> None:
    if packed.shape != (num_rows, 1 + dim):
        raise InternalError(f"{num_rows} sums of width {dim} do not lie in {tuple(packed.shape)}.")


def _check(tensor: torch.Tensor, dtype: torch.dtype, *, dim: int) -> None:
    if tensor.dtype != dtype or tensor.dim() != dim or not tensor.is_contiguous():
        raise InternalError(
            f"Sums got a {tensor.dtype} tensor of shape {tuple(tensor.shape)} and strides "
            f"{tensor.stride()}."
        )
