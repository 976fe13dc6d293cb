"""The Triton programs of `paged_attention.py`; see there for the order of arithmetic they keep.

Pointers are untyped: Triton takes types from the tensors of a launch. Upper-case arguments are
compile-time constants; HEAD is (DIM, MAIN, PAD_REST), CACHE is (BLOCK, WINDOW,
SHARED), TILES is (ROWS, TILE, SEGMENT).

A head of DIM columns is held in two parts, MAIN (a power of two) and the rest behind it (padded to
PAD_REST, 16 where there is none): tiles are powers of two, and a latent of 512 + 64 must not take
the room of 1024. BLOCK tokens lie side by side; WINDOW 0 sees all; SHARED: values are the keys.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def write_slots_kernel(
    key,
    value,
    keys,
    values,
    slots,
    key_stride,
    value_stride,
    width,
    SHARED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One row's keys and values of all heads to its slot; -1 is nowhere."""
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    column = tl.arange(0, WIDTH)
    kept = (column < width) & (slot >= 0)
    target = slot * width + column
    tl.store(keys + target, tl.load(key + row * key_stride + column, mask=kept), mask=kept)
    if not SHARED:
        numbers = tl.load(value + row * value_stride + column, mask=kept)
        tl.store(values + target, numbers, mask=kept)


@triton.jit
def request_rows(request, query_start, seq_lens):
    """A request's first row, number of rows, and tokens of context with them."""
    begin = tl.load(query_start + request)
    return begin, tl.load(query_start + request + 1) - begin, tl.load(seq_lens + request)


@triton.jit
def load_parts(start, kept, HEAD: tl.constexpr):
    """Heads at `start`, (rows, 1) pointers: (rows, MAIN) and (rows, PAD_REST); 0 where not kept."""
    DIM: tl.constexpr = HEAD[0]
    MAIN: tl.constexpr = HEAD[1]
    PAD_REST: tl.constexpr = HEAD[2]
    main = tl.arange(0, MAIN)[None, :]
    rest = MAIN + tl.arange(0, PAD_REST)[None, :]
    return (
        tl.load(start + main, mask=kept, other=0.0),
        tl.load(start + rest, mask=kept & (rest < DIM), other=0.0),
    )


@triton.jit
def store_parts(start, mixed, mixed_rest, kept, HEAD: tl.constexpr):
    """The other way round, in the type of `start`."""
    DIM: tl.constexpr = HEAD[0]
    MAIN: tl.constexpr = HEAD[1]
    PAD_REST: tl.constexpr = HEAD[2]
    kind = start.dtype.element_ty
    main = tl.arange(0, MAIN)[None, :]
    rest = MAIN + tl.arange(0, PAD_REST)[None, :]
    tl.store(start + main, mixed.to(kind), mask=kept)
    tl.store(start + rest, mixed_rest.to(kind), mask=kept & (rest < DIM))


@triton.jit
def store_sums(start, peak, total, kept):
    """The two numbers of a row in front of its values; where those begin."""
    tl.store(start, peak, mask=kept)
    tl.store(start + 1, total, mask=kept)
    return start + 2


@triton.jit
def nothing_seen(ROWS: tl.constexpr, HEAD: tl.constexpr):
    """A softmax before its first score: (peak, sum, weighted values in two parts)."""
    MAIN: tl.constexpr = HEAD[1]
    PAD_REST: tl.constexpr = HEAD[2]
    return (
        tl.full((ROWS,), float("-inf"), tl.float32),
        tl.zeros((ROWS,), tl.float32),
        tl.zeros((ROWS, MAIN), tl.float32),
        tl.zeros((ROWS, PAD_REST), tl.float32),
    )


@triton.jit
def fold_segment(
    query,
    query_rest,
    keys,
    values,
    table,
    first,
    stop,
    row_position,
    slot_stride,
    scale,
    HEAD: tl.constexpr,
    CACHE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Online softmax over positions [first, stop): (peak, sum, weighted values in two parts)."""
    DIM: tl.constexpr = HEAD[0]
    MAIN: tl.constexpr = HEAD[1]
    ROWS: tl.constexpr = TILES[0]
    TILE: tl.constexpr = TILES[1]
    BLOCK: tl.constexpr = CACHE[0]
    WINDOW: tl.constexpr = CACHE[1]
    SHARED: tl.constexpr = CACHE[2]
    peak, total, mixed, mixed_rest = nothing_seen(ROWS, HEAD)
    for start in range(first, stop, TILE):
        position = start + tl.arange(0, TILE)
        inside = position < stop
        block = tl.load(table + position // BLOCK, mask=inside, other=0).to(tl.int64)
        slot = ((block * BLOCK + position % BLOCK) * slot_stride)[:, None]
        key, key_rest = load_parts(keys + slot, inside[:, None], HEAD)
        score = tl.dot(query, tl.trans(key), input_precision="ieee")
        if MAIN < DIM:
            score = tl.dot(query_rest, tl.trans(key_rest), acc=score, input_precision="ieee")
        seen = inside[None, :] & (position[None, :] <= row_position[:, None])
        if WINDOW > 0:
            seen = seen & (position[None, :] > row_position[:, None] - WINDOW)
        score = tl.where(seen, score * scale, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        # A row that has seen nothing yet has no peak; 0 keeps infinities out of the differences.
        level = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score - level[:, None])
        shrink = tl.exp2(peak - level)
        peak = higher
        total = total * shrink + tl.sum(weight, 1)
        share = weight.to(key.dtype)
        value, value_rest = key, key_rest
        if not SHARED:
            value, value_rest = load_parts(values + slot, inside[:, None], HEAD)
        mixed = tl.dot(share, value, acc=mixed * shrink[:, None], input_precision="ieee")
        if MAIN < DIM:
            mixed_rest = tl.dot(
                share, value_rest, acc=mixed_rest * shrink[:, None], input_precision="ieee"
            )
    return peak, total, mixed, mixed_rest


@triton.jit
def merge(peak, total, other_peak, other_total):
    """Two disjoint pieces of context as one, the earlier first: (peak, sum, a weight for each)."""
    higher = tl.maximum(peak, other_peak)
    level = tl.where(higher == float("-inf"), 0.0, higher)
    mine = tl.exp2(peak - level)
    theirs = tl.exp2(other_peak - level)
    return higher, total * mine + other_total * theirs, mine, theirs


@triton.jit
def join(sums, other):
    """`merge` for all that `nothing_seen` begins."""
    peak, total, old, new = merge(sums[0], sums[1], other[0], other[1])
    mixed = sums[2] * old[:, None] + other[2] * new[:, None]
    return peak, total, mixed, sums[3] * old[:, None] + other[3] * new[:, None]


@triton.jit
def last_share(peak, total, sink, there, SINKS: tl.constexpr):
    """What weighted values are multiplied with in the end; a sink is a score without a value."""
    old = 1.0
    if SINKS:
        score = tl.load(sink, mask=there, other=float("-inf"))
        _, total, old, _ = merge(peak, total, score, 1.0)
    return old / tl.where(total > 0, total, 1.0)


@triton.jit
def attend_kernel(
    query,
    keys,
    values,
    output,
    query_start,
    seq_lens,
    tables,
    sinks,
    strides,
    segments,
    scale,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    CACHE: tl.constexpr,
    SINKS: tl.constexpr,
    TILES: tl.constexpr,
):
    """ROWS (query token, query head) pairs of one request that share one KV head.

    SPLIT: for requests with one token, one segment of the context, its unmerged pieces to
    `output` as (peak, sum, values) per (request, head, segment); else for requests with several
    tokens, all segments one after another, attention rows to `output`.
    `strides` are those of query, output, table rows and cache slots.
    """
    DIM: tl.constexpr = HEAD[0]
    WINDOW: tl.constexpr = CACHE[1]
    ROWS: tl.constexpr = TILES[0]
    SEGMENT: tl.constexpr = TILES[2]
    request, head = tl.program_id(1), tl.program_id(2)
    tile, segment = tl.program_id(0), 0
    begin, num_rows, seq_len = request_rows(request, query_start, seq_lens)
    if SPLIT:
        tile, segment = tile // segments, tile % segments
        seen = (WINDOW == 0) | (segment * SEGMENT + SEGMENT > seq_len - WINDOW)
        mine = (num_rows == 1) & (segment * SEGMENT < seq_len) & seen
    else:
        mine = (num_rows > 1) & (tile * ROWS < num_rows * GROUP)
    if mine:
        index = tile * ROWS + tl.arange(0, ROWS)
        row, query_head = index // GROUP, head * GROUP + index % GROUP
        there, place = row < num_rows, (begin + row).to(tl.int64)
        start = query + (place * strides[0] + query_head * DIM)[:, None]
        rows, rows_rest = load_parts(start, there[:, None], HEAD)
        sums = nothing_seen(ROWS, HEAD)
        if SPLIT:
            first, stop = segment * SEGMENT, tl.minimum(segment * SEGMENT + SEGMENT, seq_len)
        else:
            last_row = (tile * ROWS + ROWS - 1) // GROUP
            stop = seq_len - num_rows + tl.minimum(last_row, num_rows - 1) + 1
            earliest = tl.maximum(seq_len - num_rows + tile * ROWS // GROUP - WINDOW + 1, 0)
            first = earliest // SEGMENT * SEGMENT if WINDOW > 0 else 0
        for start in range(first, stop, SEGMENT):
            piece = fold_segment(
                rows,
                rows_rest,
                keys + head * DIM,
                values + head * DIM,
                tables + request * strides[2],
                start,
                tl.minimum(start + SEGMENT, stop),
                (seq_len - num_rows + row).to(tl.int32),
                strides[3],
                scale,
                HEAD,
                CACHE,
                TILES,
            )
            sums = join(sums, piece)
        peak, total, mixed, mixed_rest = sums
        if SPLIT:
            owner = (request * GROUP * tl.num_programs(2) + query_head).to(tl.int64)
            start = output + (owner * segments + segment) * (DIM + 2)
            start = store_sums(start, peak, total, there)[:, None]
        else:
            share = last_share(peak, total, sinks + query_head, there, SINKS)[:, None]
            mixed, mixed_rest = mixed * share, mixed_rest * share
            start = output + (place * strides[1] + query_head * DIM)[:, None]
        store_parts(start, mixed, mixed_rest, there[:, None], HEAD)


@triton.jit
def merge_kernel(
    partial,
    output,
    query_start,
    seq_lens,
    sinks,
    output_stride,
    segments,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """The segments of one request and one query head, in order."""
    request = tl.program_id(0)
    head = tl.program_id(1)
    begin, num_rows, seq_len = request_rows(request, query_start, seq_lens)
    if (num_rows == 1) & (seq_len > 0):
        dims = tl.arange(0, PAD_DIM)
        kept = dims < DIM
        first = 0
        if WINDOW > 0:
            first = tl.maximum(seq_len - WINDOW, 0) // SEGMENT
        peak = tl.full((1,), float("-inf"), tl.float32)
        total = tl.zeros((1,), tl.float32)
        mixed = tl.zeros((PAD_DIM,), tl.float32)
        place = (request * HEADS + head).to(tl.int64) * segments * (DIM + 2)
        one = tl.arange(0, 1)
        for segment in range(first, tl.cdiv(seq_len, SEGMENT)):
            here = partial + place + segment * (DIM + 2)
            peak, total, old, new = merge(peak, total, tl.load(here + one), tl.load(here + 1 + one))
            mixed = mixed * old + tl.load(here + 2 + dims, mask=kept, other=0.0) * new
        share = last_share(peak, total, sinks + head + one, one == 0, SINKS)
        target = output + begin.to(tl.int64) * output_stride + head * DIM + dims
        tl.store(target, (mixed * share).to(output.dtype.element_ty), mask=kept)
