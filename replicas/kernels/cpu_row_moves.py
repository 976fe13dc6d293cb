"""The compiled way of planning and taking apart rows; see `moe.row_moves`, which it equals."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from cluster.base.errors import InternalError
from moe.exchange.wire import Dispatch, WireFormat
from moe.plan import RowPlan
from moe.row_moves import Picked, Piece, SplitRows, TorchRowMoves
from replicas.kernels.loader import CpuLibrary

_P, _L = ctypes.c_void_p, ctypes.c_long


class CpuRowMoves:
    """Implements `RowMoves`; hidden states that are not sent as they are go torch's way."""

    def __init__(self, library: CpuLibrary) -> None:
        self._plan = library.function("pk_plan_rows", [_P, _L, _L, _P, _L, _L, _P, _P], _L)
        self._split = library.function("pk_split_rows", [_P, _P, _P, _L, _L, _L, _P, _P, _P])
        self._torch = TorchRowMoves()

    def plan(self, expert_TK: torch.Tensor, member_S: torch.Tensor, num_members: int) -> RowPlan:
        """See `RowMoves.plan`.

        Raises:
            InternalError: the tensors are no plan's, or an expert or member is none.
        """
        expert_TK = expert_TK.contiguous()
        _check(expert_TK, torch.int64, dim=2)
        _check(member_S, torch.int64, dim=1)
        num_rows, top_k = expert_TK.shape
        row_R = torch.empty(num_rows * min(num_members, top_k), dtype=torch.int64)
        counts = (ctypes.c_int64 * num_members)()
        num_copies = self._plan(
            expert_TK.data_ptr(),
            num_rows,
            top_k,
            member_S.data_ptr(),
            member_S.numel() - 1,
            num_members,
            row_R.data_ptr(),
            counts,
        )
        if num_copies < 0:
            raise InternalError(
                f"An expert is none of {member_S.numel() - 1}, or with none of {num_members}."
            )
        return RowPlan(num_rows=num_rows, row_R=row_R[:num_copies], counts=tuple(counts))

    def experts(self, format: WireFormat, pieces: Sequence[Piece]) -> torch.Tensor:
        """See `RowMoves.experts`.

        Raises:
            InternalError: the pieces are not of this format.
        """
        num_rows = _count(format, pieces)
        expert_AK = torch.empty((num_rows, format.top_k), dtype=torch.int64)
        self._take_apart(format, pieces, None, None, expert_AK)
        return expert_AK

    def split(self, format: WireFormat, pieces: Sequence[Piece]) -> SplitRows:
        """See `RowMoves.split`.

        Raises:
            InternalError: the pieces are not of this format.
        """
        plain = format.dispatch is Dispatch.EXACT
        if not plain or format.hidden_bytes != format.dim * format.dtype.itemsize:
            return self._torch.split(format, pieces)
        num_rows = _count(format, pieces)
        hidden_AD = torch.empty((num_rows, format.dim), dtype=format.dtype)
        expert_AK = torch.empty((num_rows, format.top_k), dtype=torch.int64)
        weight_AK = torch.empty((num_rows, format.top_k))
        self._take_apart(format, pieces, hidden_AD, weight_AK, expert_AK)
        return SplitRows(hidden_AD, expert_AK, weight_AK)

    def _take_apart(
        self,
        format: WireFormat,
        pieces: Sequence[Piece],
        hidden_AD: torch.Tensor | None,
        weight_AK: torch.Tensor | None,
        expert_AK: torch.Tensor,
    ) -> None:
        rows = [piece.rows_NX if isinstance(piece, Picked) else piece for piece in pieces]
        picks = [piece.row_A.data_ptr() if isinstance(piece, Picked) else None for piece in pieces]
        self._split(
            (_P * len(pieces))(*[piece.data_ptr() for piece in rows]),
            (_P * len(pieces))(*picks),
            (ctypes.c_int64 * len(pieces))(*map(_num_rows, pieces)),
            len(pieces),
            format.hidden_bytes,
            format.top_k,
            None if hidden_AD is None else hidden_AD.data_ptr(),
            None if weight_AK is None else weight_AK.data_ptr(),
            expert_AK.data_ptr(),
        )


def _count(format: WireFormat, pieces: Sequence[Piece]) -> int:
    for piece in pieces:
        rows = piece.rows_NX if isinstance(piece, Picked) else piece
        if isinstance(piece, Picked):
            _check(piece.row_A, torch.int64, dim=1)
        _check(rows, torch.uint8, dim=2)
        if rows.shape[1] != format.row_bytes:
            raise InternalError(f"Rows of {rows.shape[1]} bytes are none of {format.row_bytes}.")
    return sum(map(_num_rows, pieces))


def _num_rows(piece: Piece) -> int:
    return piece.row_A.numel() if isinstance(piece, Picked) else piece.shape[0]


def _check(tensor: torch.Tensor, dtype: torch.dtype, *, dim: int) -> None:
    if tensor.dtype != dtype or tensor.dim() != dim or not tensor.is_contiguous():
        raise InternalError(
            f"Moves of rows got a {tensor.dtype} tensor of shape {tuple(tensor.shape)} and strides "
            f"{tensor.stride()}."
        )
