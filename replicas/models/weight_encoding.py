"""Weights that a checkpoint stores as codes and scales, as one tensor each; torch-free.

A published FP8 or MXFP4 checkpoint keeps a weight in two tensors. Folded, they are one entry under
the weight's own name, of the weight's own shape, so that names, slices and sizes of everything else
(specs, planner, offload layout) are those of a plain checkpoint. `replicas/models/decoding.py`
computes the values.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cluster.base.errors import CorruptWeightsError
from replicas.models.checkpoint_files import StoredTensor

MX_GROUP = 32
"""Values of an MXFP4 group, which share a scale (OCP Microscaling Formats 1.0, section 5.2)."""
_FP8_SCALES = ("_scale_inv", "_scale")
_FP8_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
_ACTIVATION_SCALES = ("input_scale", "activation_scale")
"""For products of quantised activations, which are not made here."""
_CHECK_CONFIG = "Check that config.json belongs to these weights."


class Codes(enum.StrEnum):
    """What stands for a value."""

    MXFP4 = "mxfp4"
    """E2M1, two to a byte, low half first; a power of two for each group of 32."""
    FP8 = "fp8"
    """E4M3; a factor for all of a tensor, for each row, or for each block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightEncoding:
    """How a checkpoint stores those of its weights that are quantised."""

    codes: Codes
    title: str
    """What the checkpoint calls it."""
    block: tuple[int, int] | None = None
    """FP8: rows and columns that share a scale; the last block of each may be cut short. None: one
    scale for the tensor, or one for each row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedTensor(StoredTensor):
    """A weight in two parts; name and shape are those of the weight."""

    codes: StoredTensor
    scales: StoredTensor
    encoding: WeightEncoding


def fold_encoded(
    stored: Mapping[str, StoredTensor], encoding: WeightEncoding | None
) -> dict[str, StoredTensor]:
    """The checkpoint with one entry for each weight, encoded or not.

    Raises:
        CorruptWeightsError: codes without scales, or of shapes that do not belong together.
    """
    if encoding is None:
        return dict(stored)
    fold = _mxfp4 if encoding.codes is Codes.MXFP4 else _fp8
    parts: set[str] = set()
    folded: list[EncodedTensor] = []
    for tensor in fold(stored, encoding):
        folded.append(tensor)
        parts |= {tensor.codes.name, tensor.scales.name}
        module = tensor.name.removesuffix("weight")
        parts |= {module + name for name in _ACTIVATION_SCALES}
    plain = {name: tensor for name, tensor in stored.items() if name not in parts}
    return plain | {tensor.name: tensor for tensor in folded}


def _mxfp4(stored: Mapping[str, StoredTensor], encoding: WeightEncoding) -> Iterator[EncodedTensor]:
    """`x_blocks` (E, R, G, 16) and `x_scales` (E, R, G) are x of (E, 32 G, R)."""
    for name, codes in stored.items():
        base = name.removesuffix("_blocks")
        if base == name:
            continue
        scales = _scales_of(codes, stored.get(f"{base}_scales"), "_scales")
        _check_dtype(codes, ("U8",))
        _check_dtype(scales, ("U8", "F8_E8M0"))
        fits = len(codes.shape) == 4 and codes.shape[3] == MX_GROUP // 2
        if not fits or scales.shape != codes.shape[:3]:
            raise _misfit(codes, scales)
        experts, rows, groups, _ = codes.shape
        yield EncodedTensor(
            name=base,
            file=codes.file,
            dtype=encoding.title,
            shape=(experts, groups * MX_GROUP, rows),
            codes=codes,
            scales=scales,
            encoding=encoding,
        )


def _fp8(stored: Mapping[str, StoredTensor], encoding: WeightEncoding) -> Iterator[EncodedTensor]:
    """`x` (O, I) with `x_scale_inv`, or `x_scale`."""
    for name, codes in stored.items():
        if codes.dtype != "F8_E4M3":
            continue
        found = (stored.get(name + suffix) for suffix in _FP8_SCALES)
        scales = _scales_of(codes, next(filter(None, found), None), " or ".join(_FP8_SCALES))
        _check_dtype(scales, _FP8_SCALE_DTYPES)
        if len(codes.shape) != 2 or not _fp8_fits(codes.shape, scales.shape, encoding.block):
            raise _misfit(codes, scales)
        yield EncodedTensor(
            name=name,
            file=codes.file,
            dtype=encoding.title,
            shape=codes.shape,
            codes=codes,
            scales=scales,
            encoding=encoding,
        )


def _fp8_fits(
    codes: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int] | None
) -> bool:
    if block is None:
        return math.prod(scales) == 1 or scales in ((codes[0],), (codes[0], 1))
    return scales == (-(-codes[0] // block[0]), -(-codes[1] // block[1]))


def _scales_of(codes: StoredTensor, scales: StoredTensor | None, suffix: str) -> StoredTensor:
    if scales is None:
        raise CorruptWeightsError(
            f"{codes.file}: tensor {codes.name} is quantised and its scales ({suffix}) are "
            "missing.",
            _CHECK_CONFIG,
        )
    return scales


def _check_dtype(tensor: StoredTensor, expected: tuple[str, ...]) -> None:
    if tensor.dtype not in expected:
        raise CorruptWeightsError(
            f"{tensor.file}: tensor {tensor.name} is {tensor.dtype}; expected "
            f"{' or '.join(expected)}.",
            _CHECK_CONFIG,
        )


def _misfit(codes: StoredTensor, scales: StoredTensor) -> CorruptWeightsError:
    return CorruptWeightsError(
        f"{codes.file}: tensor {codes.name} of {list(codes.shape)} and its scales {scales.name} "
        f"of {list(scales.shape)} do not belong together.",
        _CHECK_CONFIG,
    )
