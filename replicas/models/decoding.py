"""Codes and scales of a checkpoint -> values, a slice at a time.

Values are exactly those of transformers' own dequantisation: code times scale, rounded once to the
dtype that is asked for. Only the rectangle that a rank needs is read, and rows are
decoded in parts, so that no float32 copy of a large weight ever exists.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cluster.base.errors import CorruptWeightsError
from replicas.models.checkpoint_files import StoredTensor
from replicas.models.weight_encoding import MX_GROUP, Codes, EncodedTensor

OpenFile = Callable[[Path], Any]
"""A checkpoint's file, opened by safetensors."""

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_PART_VALUES = 1 << 22
"""Values decoded at once: 16 MiB of float32."""


def decoded(
    tensor: EncodedTensor, cuts: tuple[slice, ...], dtype: torch.dtype, open_file: OpenFile
) -> torch.Tensor:
    """A rectangle of the weight, (a slice of each of its axes), in `dtype`.

    A value too large for `dtype` becomes infinite; the caller tells.

    Raises:
        CorruptWeightsError: a code or a scale is not a number.
    """
    if tensor.encoding.codes is Codes.MXFP4:
        return _mxfp4(tensor, cuts, dtype, open_file)
    return _fp8(tensor, cuts, dtype, open_file)


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; ten times as fast as asking each."""
    return not values.numel() or all(
        map(math.isfinite, torch.stack(torch.aminmax(values)).tolist())
    )


def _fp8(
    tensor: EncodedTensor, cuts: tuple[slice, ...], dtype: torch.dtype, open_file: OpenFile
) -> torch.Tensor:
    """Row o, column i of the weight: code times the scale of its block, row or tensor."""
    rows, columns = (torch.arange(tensor.shape[axis])[cut] for axis, cut in enumerate(cuts))
    codes_OI = _slice(tensor.codes, open_file, cuts)
    scales = _scale_values(tensor, (slice(None),) * len(tensor.scales.shape), open_file)
    block = tensor.encoding.block
    if block is None:
        scales_XY = scales.reshape(-1, 1)
        row_of, column_of = (rows if len(scales_XY) > 1 else rows * 0), columns[:1] * 0
    else:
        scales_XY, row_of, column_of = scales, rows // block[0], columns // block[1]
    values_OI = torch.empty(codes_OI.shape, dtype=dtype)
    for part in _parts(*codes_OI.shape):
        values = codes_OI[part].float().mul_(scales_XY[row_of[part]][:, column_of])
        values_OI[part] = _checked(tensor, values)
    return values_OI


def _mxfp4(
    tensor: EncodedTensor, cuts: tuple[slice, ...], dtype: torch.dtype, open_file: OpenFile
) -> torch.Tensor:
    """(E, C, R) from codes (E, R, C / 32, 16) and exponents (E, R, C / 32)."""
    experts, columns, rows = cuts
    first, last, step = columns.indices(tensor.shape[1])
    groups = slice(first // MX_GROUP, -(-last // MX_GROUP))
    codes_ERGB = _slice(tensor.codes, open_file, (experts, rows, groups, slice(None)))
    scales_ERG = _scale_values(tensor, (experts, rows, groups), open_file)
    num_experts, num_rows, num_groups, _ = codes_ERGB.shape
    codes, scales = codes_ERGB.flatten(0, 1), scales_ERG.flatten(0, 1).unsqueeze(-1)
    kept = slice(first - groups.start * MX_GROUP, last - groups.start * MX_GROUP, step)
    # A power of two times a code is exact in bfloat16; float16 lacks most of the powers.
    exact = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    pairs = _pairs(exact)
    values_RC = torch.empty((len(codes), len(range(first, last, step))), dtype=dtype)
    for part in _parts(len(codes), num_groups * MX_GROUP):
        pair = pairs.index_select(0, codes[part].flatten().int()).view(exact)
        values = pair.view(-1, num_groups, MX_GROUP).mul_(scales[part].to(exact))
        values_RC[part] = _checked(tensor, values).flatten(1)[:, kept]
    return values_RC.view(num_experts, num_rows, -1).transpose(1, 2)


def _pairs(dtype: torch.dtype) -> torch.Tensor:
    """Both values of each of the 256 bytes, low half first, as the bits of one integer."""
    values = torch.tensor([*_E2M1, *(-value for value in _E2M1)], dtype=dtype)
    both = torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=-1)
    return both.view(torch.int32 if dtype.itemsize == 2 else torch.int64).flatten()


def _scale_values(
    tensor: EncodedTensor, cuts: tuple[slice, ...], open_file: OpenFile
) -> torch.Tensor:
    """Scales in float32; bytes are exponents of two with a bias of 127, and 255 is no number."""
    scales = _slice(tensor.scales, open_file, cuts)
    if tensor.scales.dtype not in ("U8", "F8_E8M0"):
        return scales.float()
    powers = torch.tensor([*(2.0 ** (code - 127) for code in range(255)), float("nan")])
    return powers[scales.view(torch.uint8).int()]


def spanned(stored: Any, cuts: tuple[slice, ...]) -> torch.Tensor:
    """A rectangle of what `get_slice` opened; steps are taken after reading what they span."""
    piece: torch.Tensor = stored[tuple(slice(cut.start, cut.stop) for cut in cuts)]
    return piece[tuple(slice(None, None, cut.step) for cut in cuts)]


def _slice(tensor: StoredTensor, open_file: OpenFile, cuts: tuple[slice, ...]) -> torch.Tensor:
    file = open_file(tensor.file)
    if not cuts:  # A number has no slices.
        number: torch.Tensor = file.get_tensor(tensor.name)
        return number
    return spanned(file.get_slice(tensor.name), cuts)


def _parts(num_rows: int, width: int) -> list[slice]:
    each = max(1, _PART_VALUES // max(1, width))
    return [slice(start, start + each) for start in range(0, num_rows, each)]


def _checked(tensor: EncodedTensor, values: torch.Tensor) -> torch.Tensor:
    if not all_finite(values):
        raise CorruptWeightsError(
            f"{tensor.file}: tensor {tensor.name} holds NaN or infinite values; expected finite."
        )
    return values
