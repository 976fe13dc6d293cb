"""A step cut into micro-batches: rows that a layer computes at a time. Pure, but for tensor views.

    rows of the step   | request 0 | 1 | 2 |      request 3       | 4 |
    micro-batches      [--------------- 0 ---------|------- 1 --------]

A cut may go through a request: its later rows attend to what its earlier ones have written in the
same layer before them. Where the KV cache passes through windows on the device, a micro-batch has
no more blocks than a window.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from replicas.attention.backend import AttentionMetadata


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Rows [start, stop) of a step, and the requests [first, last) they belong to."""

    start: int
    stop: int
    first: int
    last: int
    joins: bool = False
    """Its first request has rows in the micro-batch before, whose keys and values it reads."""


def cut_rows(
    metadata: AttentionMetadata, max_tokens: int, *, block_size: int = 1, max_blocks: int = 0
) -> tuple[Cut, ...]:
    """The fewest micro-batches of at most `max_tokens` rows, about as large as each other.

    Args:
        max_tokens: 0: as many as there are.
        max_blocks: KV blocks of a micro-batch, at least those of the longest request; 0: no bound.

    Raises:
        ValueError: a request has more blocks than a micro-batch may have.
    """
    bounds = list(pairwise(metadata.query_start))
    total = metadata.query_start[-1]
    count = -(-total // max_tokens) if max_tokens else 1
    size = -(-total // max(1, count))
    cuts: list[Cut] = []
    start, first, room = 0, 0, max_blocks
    for request, (begin, end) in enumerate(bounds):
        blocks = -(-metadata.seq_lens[request] // block_size) if max_blocks else 0
        if blocks > max_blocks:
            raise ValueError(f"a request has {blocks} blocks and a micro-batch {max_blocks}")
        if blocks > room:
            cuts.append(_cut(bounds, start, begin, first, request))
            start, first, room = begin, request, max_blocks
        while end - start > size:
            stop = start + size
            last = request + (stop > begin)
            cuts.append(_cut(bounds, start, stop, first, last))
            start, first, room = stop, request, max_blocks
        room -= blocks
    if start < total:
        cuts.append(_cut(bounds, start, total, first, len(bounds)))
    return tuple(cuts)


def part_of(metadata: AttentionMetadata, cut: Cut) -> AttentionMetadata:
    """The cut's rows as a step of their own; block ids stay those of the whole cache."""
    requests = slice(cut.first, cut.last)
    bounds = list(pairwise(metadata.query_start))[requests]
    stops = [min(end, cut.stop) for _, end in bounds]
    starts = [cut.start - cut.start, *(stop - cut.start for stop in stops)]
    # The last request's later rows, and so its later context, belong to the next micro-batch.
    lens = [
        length - (end - stop)
        for length, (_, end), stop in zip(metadata.seq_lens[requests], bounds, stops, strict=True)
    ]
    lens_R, starts_R1 = metadata.seq_lens_R, metadata.query_start_R1
    return AttentionMetadata(
        query_start=tuple(starts),
        seq_lens=tuple(lens),
        query_start_R1=starts_R1.new_tensor(starts),
        seq_lens_R=lens_R.new_tensor(lens),
        block_tables_RN=metadata.block_tables_RN[requests],
        slot_mapping_T=metadata.slot_mapping_T[cut.start : cut.stop],
    )


def _cut(bounds: list[tuple[int, int]], start: int, stop: int, first: int, last: int) -> Cut:
    return Cut(start=start, stop=stop, first=first, last=last, joins=bounds[first][0] < start)
