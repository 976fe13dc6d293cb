"""The Triton programs of `paged_attention.py`; see there for the order of arithmetic they keep.

Pointers are untyped: Triton takes types from the tensors of a launch. Upper-case arguments are
compile-time constants.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def write_slots_kernel(
    key, value, keys, values, slots, key_stride, value_stride, width, WIDTH: tl.constexpr
):
    """One row's keys and values of all heads to its slot; -1 is nowhere."""
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    column = tl.arange(0, WIDTH)
    kept = (column < width) & (slot >= 0)
    target = slot * width + column
    tl.store(keys + target, tl.load(key + row * key_stride + column, mask=kept), mask=kept)
    tl.store(values + target, tl.load(value + row * value_stride + column, mask=kept), mask=kept)


@triton.jit
def fold_segment(
    query,
    keys,
    values,
    table,
    first,
    stop,
    row_position,
    slot_stride,
    scale,
    DIM: tl.constexpr,
    PAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Online softmax over positions [first, stop) for ROWS rows: (peak, sum, weighted values)."""
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, PAD_DIM), tl.float32)
    dims = tl.arange(0, PAD_DIM)
    for start in range(first, stop, TILE):
        position = start + tl.arange(0, TILE)
        inside = position < stop
        block = tl.load(table + position // BLOCK, mask=inside, other=0).to(tl.int64)
        slot = (block * BLOCK + position % BLOCK) * slot_stride
        here = inside[:, None] & (dims < DIM)[None, :]
        key = tl.load(keys + slot[:, None] + dims[None, :], mask=here, other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        seen = inside[None, :] & (position[None, :] <= row_position[:, None])
        if WINDOW > 0:
            seen = seen & (position[None, :] > row_position[:, None] - WINDOW)
        score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        # A row that has seen nothing yet has no peak; 0 keeps infinities out of the differences.
        level = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score - level[:, None])
        shrink = tl.exp2(peak - level)
        value = tl.load(values + slot[:, None] + dims[None, :], mask=here, other=0.0)
        total = total * shrink + tl.sum(weight, 1)
        mixed = mixed * shrink[:, None] + tl.dot(
            weight.to(value.dtype), value, input_precision="ieee"
        )
        peak = higher
    return peak, total, mixed


@triton.jit
def merge(peak, total, mixed, other_peak, other_total, other_mixed):
    """Two disjoint pieces of context as one; the first is the earlier one."""
    higher = tl.maximum(peak, other_peak)
    level = tl.where(higher == float("-inf"), 0.0, higher)
    mine = tl.exp2(peak - level)
    theirs = tl.exp2(other_peak - level)
    total = total * mine + other_total * theirs
    mixed = mixed * tl.expand_dims(mine, -1) + other_mixed * tl.expand_dims(theirs, -1)
    return higher, total, mixed


@triton.jit
def prompt_kernel(
    query,
    keys,
    values,
    output,
    query_start,
    seq_lens,
    tables,
    table_stride,
    query_stride,
    output_stride,
    slot_stride,
    scale,
    QUERIES: tl.constexpr,
    GROUP: tl.constexpr,
    PAD_GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    SEGMENT: tl.constexpr,
    TILE: tl.constexpr,
):
    """QUERIES rows of one request for one KV head; nothing to do for requests with one row."""
    request = tl.program_id(1)
    head = tl.program_id(2)
    begin = tl.load(query_start + request)
    num_rows = tl.load(query_start + request + 1) - begin
    first_row = tl.program_id(0) * QUERIES
    if (num_rows > 1) & (first_row < num_rows):
        seq_len = tl.load(seq_lens + request)
        ROWS: tl.constexpr = QUERIES * PAD_GROUP
        index = tl.arange(0, ROWS)
        row = first_row + index // PAD_GROUP
        member = index % PAD_GROUP
        dims = tl.arange(0, PAD_DIM)
        kept = ((row < num_rows) & (member < GROUP))[:, None] & (dims < DIM)[None, :]
        place = (begin + row).to(tl.int64)
        column = ((head * GROUP + member) * DIM)[:, None] + dims[None, :]
        rows = tl.load(query + place[:, None] * query_stride + column, mask=kept, other=0.0)
        position = seq_len - num_rows + row
        stop = tl.minimum(seq_len, seq_len - num_rows + first_row + QUERIES)
        first = 0
        if WINDOW > 0:
            earliest = tl.maximum(seq_len - num_rows + first_row - WINDOW + 1, 0)
            first = earliest // SEGMENT * SEGMENT
        peak = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        mixed = tl.zeros((ROWS, PAD_DIM), tl.float32)
        for start in range(first, stop, SEGMENT):
            other_peak, other_total, other_mixed = fold_segment(
                rows,
                keys + head * DIM,
                values + head * DIM,
                tables + request * table_stride,
                start,
                tl.minimum(start + SEGMENT, stop),
                position,
                slot_stride,
                scale,
                DIM,
                PAD_DIM,
                BLOCK,
                WINDOW,
                ROWS,
                TILE,
            )
            peak, total, mixed = merge(peak, total, mixed, other_peak, other_total, other_mixed)
        result = mixed / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(
            output + place[:, None] * output_stride + column,
            result.to(output.dtype.element_ty),
            mask=kept,
        )


@triton.jit
def decode_kernel(
    query,
    keys,
    values,
    partial,
    query_start,
    seq_lens,
    tables,
    table_stride,
    query_stride,
    slot_stride,
    segments,
    scale,
    GROUP: tl.constexpr,
    PAD_GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    SEGMENT: tl.constexpr,
    TILE: tl.constexpr,
):
    """One segment of one request's context for the query heads of one KV head."""
    segment = tl.program_id(0)
    request = tl.program_id(1)
    head = tl.program_id(2)
    begin = tl.load(query_start + request)
    num_rows = tl.load(query_start + request + 1) - begin
    seq_len = tl.load(seq_lens + request)
    start = segment * SEGMENT
    if (num_rows == 1) & (start < seq_len):
        member = tl.arange(0, PAD_GROUP)
        dims = tl.arange(0, PAD_DIM)
        kept = (member < GROUP)[:, None] & (dims < DIM)[None, :]
        column = ((head * GROUP + member) * DIM)[:, None] + dims[None, :]
        rows = tl.load(query + begin.to(tl.int64) * query_stride + column, mask=kept, other=0.0)
        peak, total, mixed = fold_segment(
            rows,
            keys + head * DIM,
            values + head * DIM,
            tables + request * table_stride,
            start,
            tl.minimum(start + SEGMENT, seq_len),
            tl.zeros((PAD_GROUP,), tl.int32) + (seq_len - 1).to(tl.int32),
            slot_stride,
            scale,
            DIM,
            PAD_DIM,
            BLOCK,
            WINDOW,
            PAD_GROUP,
            TILE,
        )
        owner = request * GROUP * tl.num_programs(2) + head * GROUP + member
        place = (owner.to(tl.int64) * segments + segment) * (PAD_DIM + 2)
        tl.store(partial + place, peak, mask=member < GROUP)
        tl.store(partial + place + 1, total, mask=member < GROUP)
        tl.store(
            partial + (place + 2)[:, None] + dims[None, :], mixed, mask=(member < GROUP)[:, None]
        )


@triton.jit
def merge_kernel(
    partial,
    output,
    query_start,
    seq_lens,
    output_stride,
    segments,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """The segments of one request and one query head, in order."""
    request = tl.program_id(0)
    head = tl.program_id(1)
    begin = tl.load(query_start + request)
    num_rows = tl.load(query_start + request + 1) - begin
    seq_len = tl.load(seq_lens + request)
    if (num_rows == 1) & (seq_len > 0):
        dims = tl.arange(0, PAD_DIM)
        first = 0
        if WINDOW > 0:
            first = tl.maximum(seq_len - WINDOW, 0) // SEGMENT
        peak = tl.full((1,), float("-inf"), tl.float32)
        total = tl.zeros((1,), tl.float32)
        mixed = tl.zeros((1, PAD_DIM), tl.float32)
        place = (request * HEADS + head).to(tl.int64) * segments * (PAD_DIM + 2)
        one = tl.arange(0, 1)
        for segment in range(first, tl.cdiv(seq_len, SEGMENT)):
            here = partial + place + segment * (PAD_DIM + 2)
            peak, total, mixed = merge(
                peak,
                total,
                mixed,
                tl.load(here + one),
                tl.load(here + 1 + one),
                tl.load(here + 2 + one[:, None] + dims[None, :]),
            )
        result = mixed / tl.where(total > 0, total, 1.0)[:, None]
        column = head * DIM + dims[None, :] + one[:, None]
        tl.store(
            output + begin.to(tl.int64) * output_stride + column,
            result.to(output.dtype.element_ty),
            mask=(dims < DIM)[None, :],
        )
