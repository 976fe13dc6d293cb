"""Which weights are held in fp8 and what they take; knows no torch, so the planner may ask."""

from __future__ import annotations

from collections.abc import Sequence

FP8_TILE = 16
"""The multiplication wants whole tiles of so many features on both sides."""
FP8_SCALE_BYTES = 4
"""A scale per output feature, fp32; a code takes one byte."""


def fits_fp8(shape: Sequence[int]) -> bool:
    """Whether a weight of (output, input) features is held in fp8; else it stays plain."""
    return len(shape) == 2 and not shape[0] % FP8_TILE and not shape[1] % FP8_TILE


def fp8_bytes(shape: Sequence[int]) -> int:
    """Bytes of such a weight."""
    return shape[0] * (shape[1] + FP8_SCALE_BYTES)
