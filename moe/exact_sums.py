"""Sums of experts' outputs whose bits do not depend on who adds what, where and in which order.

A sum of fp32 numbers depends on its order, and which experts share a rank or a node decides the
order. Here a row is rounded once, before anything is added; from then on every addition is exact:

    settle    weight x output of one (token, expert), fp32: each element to a multiple of a grid,
              2^-22 of what the row's largest element rounds up to (a power of two)
    add       fp64 or integers: multiples of grids that lie close together, nothing is rounded
    round     once to fp32, where the token lives

The grid depends on the row, its gate weight and the token's largest gate weight alone, all of them
the same on every rank. A light expert's grid is coarser by the ratio of the weights, 2^6 at most:
its row counts for less, and grids that differ less need fewer bits for a sum. The numbers of a
token's rows may lie 2^28 apart before an fp64 sum has to round; a row with a NaN or an infinity
becomes NaN throughout.

The idea is pre-rounding, as in reproducible summation (Demmel & Nguyen, "Parallel Reproducible
Summation", IEEE Trans. Computers 2015), with one grid per row instead of one per sum, so that
nobody has to agree on anything first. `add` in `replicas/kernels/cpu/exact.h` and Triton's sum
kernel are held to this file.
"""

from __future__ import annotations

import torch

BITS = 22
"""Of a row's largest element; the rest of fp32's 24 carry the rounding below."""
MAX_SHIFT = 6
"""Bits that a light expert's row may lose besides."""
_MANTISSA, _EXPONENT_MAX = 23, 255


def settle(
    products_MD: torch.Tensor, weight_M: torch.Tensor, heaviest_M: torch.Tensor
) -> torch.Tensor:
    """The rows on their grids: fp32, each a whole multiple of a power of two.

    Args:
        products_MD: fp32; weight times output of one (token, expert) each.
        weight_M: fp32 gate weights of these pairs.
        heaviest_M: fp32; the largest magnitude among all gate weights of the pair's token.
    """
    exponent_M = _exponent(products_MD.abs().amax(dim=1))
    lighter_M = (_exponent(heaviest_M) - _exponent(weight_M.abs())).clamp(0, MAX_SHIFT)
    # 1.5 x 2^23 grids: added and taken away again, it leaves whole multiples, ties to even. At the
    # top exponent the pattern is a NaN, and so is the row.
    place_M = (exponent_M + lighter_M + _MANTISSA + 1 - BITS).clamp(max=_EXPONENT_MAX)
    anchor_M1 = ((place_M << _MANTISSA) | (1 << (_MANTISSA - 1))).view(torch.float32).unsqueeze(1)
    return (products_MD + anchor_M1) - anchor_M1


def heaviest(weight_AK: torch.Tensor) -> torch.Tensor:
    """The largest magnitude among the gate weights of each token, (A,) fp32."""
    return weight_AK.abs().amax(dim=1)


def _exponent(magnitude: torch.Tensor) -> torch.Tensor:
    """The biased exponent of non-negative fp32 numbers, int32; 255: infinite or no number."""
    return magnitude.contiguous().view(torch.int32) >> _MANTISSA
