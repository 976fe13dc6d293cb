"""Triton programs on rows: norms, head norms with rotation, gates. One program owns one row.

Sums in fp32 over a whole row at once, so a row's bits do not depend on its neighbours. Products are
rounded where torch's kernels round, so that both sets give the same model. Pointers are untyped;
upper-case arguments are compile-time constants.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_rms_norm_kernel(
    hidden, delta, weight, total, output, width, eps, HAS_DELTA: tl.constexpr, WIDTH: tl.constexpr
):
    """total = hidden + delta; output = weight * (total / rms(total))."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    kept = column < width
    value = tl.load(hidden + row * width + column, mask=kept, other=0.0)
    if HAS_DELTA:
        value += tl.load(delta + row * width + column, mask=kept, other=0.0)
        tl.store(total + row * width + column, value, mask=kept)
    wide = value.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, 0) / width + eps)
    normed = (wide * scale).to(value.dtype)
    gain = tl.load(weight + column, mask=kept, other=0.0)
    tl.store(output + row * width + column, gain * normed, mask=kept)


@triton.jit
def prepare_heads_kernel(
    fused,
    query_norm,
    key_norm,
    cos,
    sin,
    row_stride,
    eps,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    NORMED: tl.constexpr,
    ROTATED: tl.constexpr,
):
    """One query or key head of one row, in place: RMS norm, then rotation of halves."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    place = fused + row * row_stride + head * DIM
    low = tl.arange(0, HALF)
    kept = low < DIM // 2
    first = tl.load(place + low, mask=kept, other=0.0)
    second = tl.load(place + DIM // 2 + low, mask=kept, other=0.0)
    if NORMED:
        norm = query_norm
        if head >= HEADS:
            norm = key_norm
        wide_first = first.to(tl.float32)
        wide_second = second.to(tl.float32)
        squares = tl.sum(wide_first * wide_first, 0) + tl.sum(wide_second * wide_second, 0)
        scale = 1.0 / tl.sqrt_rn(squares / DIM + eps)
        gain_first = tl.load(norm + low, mask=kept, other=0.0)
        gain_second = tl.load(norm + DIM // 2 + low, mask=kept, other=0.0)
        first = gain_first * (wide_first * scale).to(first.dtype)
        second = gain_second * (wide_second * scale).to(second.dtype)
    if ROTATED:
        angle = row * DIM + low
        cos_first = tl.load(cos + angle, mask=kept, other=0.0)
        sin_first = tl.load(sin + angle, mask=kept, other=0.0)
        cos_second = tl.load(cos + angle + DIM // 2, mask=kept, other=0.0)
        sin_second = tl.load(sin + angle + DIM // 2, mask=kept, other=0.0)
        turned = first * cos_first - second * sin_first
        second = second * cos_second + first * sin_second
        first = turned
    tl.store(place + low, first, mask=kept)
    tl.store(place + DIM // 2 + low, second, mask=kept)


@triton.jit
def silu_mul_kernel(gate_up, output, width, WIDTH: tl.constexpr):
    """silu(first half of a row) * second half, a stretch of WIDTH columns."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    kept = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=kept, other=0.0)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=kept, other=0.0)
    wide = gate.to(tl.float32)
    activated = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    tl.store(output + row * width + column, activated * up, mask=kept)


@triton.jit
def quantise_rows_kernel(rows, codes, scales, width, largest, WIDTH: tl.constexpr):
    """codes = row / scale rounded to the codes' type, scale = max |row| / largest."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    kept = column < width
    value = tl.load(rows + row * width + column, mask=kept, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(value), 0) / largest, 1e-12)
    tl.store(codes + row * width + column, (value / scale).to(codes.dtype.element_ty), mask=kept)
    tl.store(scales + row, scale)
