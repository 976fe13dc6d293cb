"""Exact sums as they travel: 31-bit integers with one exponent a row, packed and added.

    | head: int32 | D elements: int32 |   head = 4 x exponent + 2 if no numbers + 1 if there is more

An element is `int x 2^(exponent - 31)`: as many bytes as fp32 and 31 bits that all count, so sums
of settled rows (`moe/exact_sums.py`) arrive as they left. A sum that needs more bits says so, and
`lower_bits` are what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

MORE, NO_NUMBERS = 1, 2
_BITS = 31
_LEAST_EXPONENT = -200  # below every sum of fp32 numbers but zero
_BIAS, _MANTISSA = 1023, 52


class RowSums(Protocol):
    """Packs and adds rows of exact sums; compiled or in torch, to the same bits.

    Packed copies come in pieces, one after the other; copy `i` of all belongs to row `row_R[i]`.
    """

    def pack(self, sums_AD: torch.Tensor, into_AX: torch.Tensor) -> bool:
        """fp64 sums as int32 (A, 1 + D), head first; whether some rows lack bits (`MORE`)."""
        ...

    def add(self, packed_RX: torch.Tensor, row_R: torch.Tensor, sums_TD: torch.Tensor) -> None:
        """Add the upper bits of packed rows to the fp64 rows they belong to, in place."""
        ...

    def join(
        self, pieces: Sequence[torch.Tensor], row_R: torch.Tensor, into_TX: torch.Tensor
    ) -> bool:
        """The sum of each row's copies, packed again as int32 (T, 1 + D).

        Returns:
            Whether every bit is there; if not, `into_TX` is of no use and the sums have to be made
            with `add` and the copies' lower bits.
        """
        ...

    def total(
        self, pieces: Sequence[torch.Tensor], row_R: torch.Tensor, into_TD: torch.Tensor
    ) -> bool:
        """The same, rounded to fp32 (T, D)."""
        ...


class TorchRowSums:
    """`RowSums` in torch: every platform, and what others are tested against."""

    def pack(self, sums_AD: torch.Tensor, into_AX: torch.Tensor) -> bool:
        """See `RowSums.pack`."""
        exponent_A, numbers_A = _exponents(sums_AD)
        scaled_AD = sums_AD * _power(_BITS - exponent_A).unsqueeze(1)
        scaled_AD = torch.where(numbers_A.unsqueeze(1), scaled_AD, 0.0)
        whole_AD = scaled_AD.trunc()
        into_AX[:, 1:] = whole_AD
        more_A = (whole_AD != scaled_AD).any(dim=1)
        into_AX[:, 0] = 4 * exponent_A + NO_NUMBERS * ~numbers_A + MORE * more_A
        return bool(more_A.any())

    def add(self, packed_RX: torch.Tensor, row_R: torch.Tensor, sums_TD: torch.Tensor) -> None:
        """See `RowSums.add`."""
        scale_R1 = _head_scale(packed_RX[:, 0]).unsqueeze(1)
        sums_TD.index_add_(0, row_R, packed_RX[:, 1:].double() * scale_R1)

    def join(
        self, pieces: Sequence[torch.Tensor], row_R: torch.Tensor, into_TX: torch.Tensor
    ) -> bool:
        """See `RowSums.join`."""
        sums_TD = self._sums(pieces, row_R, into_TX.shape[0])
        return sums_TD is not None and not self.pack(sums_TD, into_TX)

    def total(
        self, pieces: Sequence[torch.Tensor], row_R: torch.Tensor, into_TD: torch.Tensor
    ) -> bool:
        """See `RowSums.total`."""
        sums_TD = self._sums(pieces, row_R, into_TD.shape[0])
        if sums_TD is not None:
            into_TD.copy_(sums_TD)
        return sums_TD is not None

    def _sums(
        self, pieces: Sequence[torch.Tensor], row_R: torch.Tensor, num_rows: int
    ) -> torch.Tensor | None:
        packed_RX = torch.cat(list(pieces))
        if (packed_RX[:, 0] & MORE).any():
            return None
        sums_TD = torch.zeros((num_rows, packed_RX.shape[1] - 1), dtype=torch.float64)
        self.add(packed_RX, row_R, sums_TD)
        return sums_TD


def has_more(packed_AX: torch.Tensor) -> torch.Tensor:
    """The rows whose lower bits travel as well, ascending."""
    return (packed_AX[:, 0] & MORE).nonzero().squeeze(1)


def lower_bits(packed_FX: torch.Tensor, sums_FD: torch.Tensor) -> torch.Tensor:
    """What `pack` left out: int32 (F, D), multiples of 2^-31 of the upper part's."""
    scaled_FD = sums_FD / _head_scale(packed_FX[:, 0]).unsqueeze(1)
    rest_FD = (scaled_FD - packed_FX[:, 1:].double()) * 2.0**_BITS
    return rest_FD.round().clamp(-(2.0**_BITS) + 1, 2.0**_BITS - 1).int()


def add_lower_bits(
    lower_FD: torch.Tensor, packed_FX: torch.Tensor, row_F: torch.Tensor, sums_TD: torch.Tensor
) -> None:
    """Add what `pack` left out of some rows to the fp64 rows they belong to, in place."""
    scale_F1 = _head_scale(packed_FX[:, 0]).unsqueeze(1) * 2.0**-_BITS
    sums_TD.index_add_(0, row_F, lower_FD.double() * scale_F1)


def _exponents(sums_AD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The power of two above each row's largest element (int64), and whether all are numbers."""
    most_A = sums_AD.abs().amax(dim=1)
    exponent_A = (most_A.view(torch.int64) >> _MANTISSA) - (_BIAS - 1)
    numbers_A = most_A.isfinite()
    return torch.where(numbers_A, exponent_A.clamp(min=_LEAST_EXPONENT), 0), numbers_A


def _power(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent as fp64, from an integer within its range."""
    return ((exponent.long() + _BIAS) << _MANTISSA).view(torch.float64)


def _head_scale(head_R: torch.Tensor) -> torch.Tensor:
    """What a row's integers are multiples of, fp64; NaN for rows that are no numbers."""
    scale_R = _power((head_R >> 2) - _BITS)
    return torch.where((head_R & NO_NUMBERS).bool(), torch.nan, scale_R)
