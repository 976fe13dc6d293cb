"""Triton programs for the routed experts of a layer: gate, down, and a row's sum over its experts.

Pairs of row and expert lie sorted by expert; one program owns up to BM pairs of one expert and
some columns. Blocks have one size whatever the batch and the depth is cut the same way, so a row's
bits do not depend on its neighbours; a row's experts are added exactly, by one program.
Experts are tensors of their own, reached through a table of addresses, four per expert (gate and
up, their bias, down, its bias; 0: none). Roundings are where the kernels one by one have them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expert_gate_kernel(
    hidden,
    row_of_pair,
    block_expert,
    block_first,
    block_end,
    addresses,
    inner,
    dim,
    ffn,
    limit,
    alpha,
    BIASED: tl.constexpr,
    CLAMPED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """inner[pair] = activation(gate, up) of the pair's row; blocks without an expert do nothing."""
    block = tl.program_id(0)
    expert = tl.load(block_expert + block)
    if expert < 0:
        return
    kind: tl.constexpr = hidden.dtype.element_ty
    pair = tl.load(block_first + block) + tl.arange(0, BM)
    kept = pair < tl.load(block_end + block)
    row = tl.load(row_of_pair + pair, mask=kept, other=0)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    real = column < ffn
    weight = tl.load(addresses + expert * 4).to(tl.pointer_type(kind))
    gate = tl.zeros((BM, BN), tl.float32)
    up = tl.zeros((BM, BN), tl.float32)
    for begin in range(0, dim, BK):
        depth = begin + tl.arange(0, BK)
        inside = depth < dim
        x = tl.load(
            hidden + row[:, None] * dim + depth[None, :],
            mask=kept[:, None] & inside[None, :],
            other=0.0,
        )
        at = weight + column[None, :].to(tl.int64) * dim + depth[:, None]
        both = real[None, :] & inside[:, None]
        first = tl.load(at, mask=both, other=0.0)
        second = tl.load(at + ffn.to(tl.int64) * dim, mask=both, other=0.0)
        gate = tl.dot(x, first, gate, input_precision="ieee")
        up = tl.dot(x, second, up, input_precision="ieee")
    if BIASED:
        bias = tl.load(addresses + expert * 4 + 1).to(tl.pointer_type(kind))
        gate += tl.load(bias + column, mask=real, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias + ffn + column, mask=real, other=0.0).to(tl.float32)[None, :]
    gate = gate.to(kind).to(tl.float32)
    up = up.to(kind).to(tl.float32)
    if CLAMPED:
        gate = (tl.minimum(gate, limit) * alpha).to(kind).to(tl.float32)
        up = (tl.minimum(tl.maximum(up, -limit), limit) + 1.0).to(kind).to(tl.float32)
    value = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32) * up
    if CLAMPED:
        value = value.to(kind).to(tl.float32) / alpha
    tl.store(
        inner + pair[:, None].to(tl.int64) * ffn + column[None, :],
        value.to(kind),
        mask=kept[:, None] & real[None, :],
    )


@triton.jit
def expert_down_kernel(
    inner,
    weight_of_pair,
    block_expert,
    block_first,
    block_end,
    addresses,
    products,
    dim,
    ffn,
    BIASED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """products[pair] = (down(inner[pair]) + bias) * the pair's weight, fp32."""
    block = tl.program_id(0)
    expert = tl.load(block_expert + block)
    if expert < 0:
        return
    kind: tl.constexpr = inner.dtype.element_ty
    pair = tl.load(block_first + block) + tl.arange(0, BM)
    kept = pair < tl.load(block_end + block)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    real = column < dim
    weight = tl.load(addresses + expert * 4 + 2).to(tl.pointer_type(kind))
    sums = tl.zeros((BM, BN), tl.float32)
    for begin in range(0, ffn, BK):
        depth = begin + tl.arange(0, BK)
        inside = depth < ffn
        x = tl.load(
            inner + pair[:, None].to(tl.int64) * ffn + depth[None, :],
            mask=kept[:, None] & inside[None, :],
            other=0.0,
        )
        w = tl.load(
            weight + column[None, :].to(tl.int64) * ffn + depth[:, None],
            mask=real[None, :] & inside[:, None],
            other=0.0,
        )
        sums = tl.dot(x, w, sums, input_precision="ieee")
    if BIASED:
        bias = tl.load(addresses + expert * 4 + 3).to(tl.pointer_type(kind))
        sums += tl.load(bias + column, mask=real, other=0.0).to(tl.float32)[None, :]
    share = tl.load(weight_of_pair + pair, mask=kept, other=0.0)
    tl.store(
        products + pair[:, None].to(tl.int64) * dim + column[None, :],
        sums * share[:, None],
        mask=kept[:, None] & real[None, :],
    )


@triton.jit
def _magnitude_bits(value):
    # As integers a NaN is above infinity and infinity above all numbers.
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def expert_sum_kernel(
    products,
    pair_of_row,
    weight_of_pair,
    heaviest_of_row,
    num_pairs,
    output,
    dim,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    MAX_SHIFT: tl.constexpr,
):
    """output[row] = the exact fp64 sum of its pairs' settled products, without pairs elsewhere.

    `num_pairs`: address of how many pairs are here. What settling is: `moe/exact_sums.py`.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    kept = column < dim
    here = tl.load(num_pairs)
    heaviest = _magnitude_bits(tl.load(heaviest_of_row + row)) >> 23
    total = tl.zeros((WIDTH,), tl.float64)
    for k in range(TOP_K):
        pair = tl.load(pair_of_row + row * TOP_K + k)
        if pair < here:
            line = products + pair * dim
            most = tl.zeros((WIDTH,), tl.int32)
            # Every program of a row looks at all of it: a whole row is a few stretches, in cache.
            for begin in range(0, dim, WIDTH):
                at = begin + tl.arange(0, WIDTH)
                most = tl.maximum(
                    most, _magnitude_bits(tl.load(line + at, mask=at < dim, other=0.0))
                )
            weight = _magnitude_bits(tl.load(weight_of_pair + pair)) >> 23
            lighter = tl.minimum(tl.maximum(heaviest - weight, 0), MAX_SHIFT)
            place = tl.minimum((tl.max(most, axis=0) >> 23) + lighter + (24 - BITS), 255)
            anchor = ((place << 23) | (1 << 22)).to(tl.float32, bitcast=True)
            value = (tl.load(line + column, mask=kept, other=0.0) + anchor) - anchor
            total += value.to(tl.float64)
    tl.store(output + row * dim + column, total, mask=kept)
