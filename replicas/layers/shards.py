"""How one rank's share is cut from a checkpoint tensor: the shard rules, each written once.

Torch-free: loader, memory planner and offload layout read the `TensorSpec`s made here. Column
rules split the output features of a linear (and its bias), row rules the input features; every
rank owns contiguous heads. Key/value heads that are fewer than the ranks are held in copies, so
that each rank's query heads find theirs at home.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from replicas.layers.weights import Source, TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One rank's place on the tensor-parallel axis."""

    rank: int
    size: int

    def span(self, total: int, unit: int = 1) -> tuple[int, int]:
        """This rank's [start, stop) of `total` features that move in whole units (heads).

        With fewer units than ranks, neighbouring ranks share one.
        """
        units = total // unit
        if units < self.size:
            start = self.rank * units // self.size
            return start * unit, (start + 1) * unit
        share = units // self.size * unit
        return self.rank * share, (self.rank + 1) * share

    def padded_rows(self, total: int) -> int:
        """Rows of each rank when `total` rows are padded to a multiple of the ranks."""
        return math.ceil(total / self.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One checkpoint linear that feeds a fused local one.

    Several pieces may come from one stored tensor (GPT-2's `c_attn` holds q, k and v): `offset`
    is where this piece's output features begin in it and `stored_out` how many it has in all.
    """

    name: str
    out_features: int
    unit: int = 1
    """Features that must stay together (a head)."""
    offset: int = 0
    stored_out: int = 0

    @property
    def stored_features(self) -> int:
        """Output features of the stored tensor."""
        return self.stored_out or self.out_features


def replicated(name: str, source: str, shape: tuple[int, ...]) -> TensorSpec:
    """Every rank holds the whole tensor."""
    return TensorSpec(name=name, shape=shape, sources=(Source(name=source),), full_shapes=(shape,))


def column_weight(
    name: str, pieces: tuple[Piece, ...], in_features: int, shard: Shard, *, transposed: bool
) -> TensorSpec:
    """Local (out, in) weight whose output features are split; `transposed`: stored as (in, out)."""
    sources, shapes, rows = [], [], 0
    for piece in pieces:
        start, stop = shard.span(piece.out_features, piece.unit)
        rows += stop - start
        sources.append(
            Source(
                name=f"{piece.name}.weight",
                dim=1 if transposed else 0,
                start=piece.offset + start,
                stop=piece.offset + stop,
                transpose=transposed,
            )
        )
        stored = (piece.stored_features, in_features)
        shapes.append(stored[::-1] if transposed else stored)
    return TensorSpec(
        name=f"{name}.weight",
        shape=(rows, in_features),
        sources=tuple(sources),
        full_shapes=tuple(shapes),
    )


def column_bias(name: str, pieces: tuple[Piece, ...], shard: Shard) -> TensorSpec:
    """The bias that goes with `column_weight`."""
    spans = [shard.span(piece.out_features, piece.unit) for piece in pieces]
    return TensorSpec(
        name=f"{name}.bias",
        shape=(sum(stop - start for start, stop in spans),),
        sources=tuple(
            Source(name=f"{piece.name}.bias", start=piece.offset + start, stop=piece.offset + stop)
            for piece, (start, stop) in zip(pieces, spans, strict=True)
        ),
        full_shapes=tuple((piece.stored_features,) for piece in pieces),
    )


def row_weight(
    name: str, source: str, features: tuple[int, int], shard: Shard, *, transposed: bool
) -> TensorSpec:
    """Local (out, in) weight whose input features are split.

    Args:
        features: global (out, in).
        transposed: stored as (in, out).
    """
    out_features, in_features = features
    start, stop = shard.span(in_features)
    piece = Source(
        name=f"{source}.weight",
        dim=0 if transposed else 1,
        start=start,
        stop=stop,
        transpose=transposed,
    )
    return TensorSpec(
        name=f"{name}.weight",
        shape=(out_features, stop - start),
        sources=(piece,),
        full_shapes=((in_features, out_features) if transposed else (out_features, in_features),),
    )


def vocabulary(
    name: str,
    source: str,
    shape: tuple[int, int],
    shard: Shard,
    duplicates: tuple[str, ...] = (),
) -> TensorSpec:
    """This rank's rows of a (V, D) table, zero rows after the true vocabulary.

    A rank that lies in the padding altogether still names the table, with an empty slice.
    """
    vocab_size, width = shape
    rows = shard.padded_rows(vocab_size)
    start = min(shard.rank * rows, vocab_size)
    stop = min(start + rows, vocab_size)
    return TensorSpec(
        name=name,
        shape=(rows, width),
        sources=(Source(name=source, start=start, stop=stop),),
        full_shapes=(shape,),
        duplicates=duplicates,
    )
