"""Shard rules: the ranks' pieces together are the whole, whatever the sizes."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from replicas.layers.shards import (
    Piece,
    Shard,
    column_bias,
    column_weight,
    row_weight,
    vocabulary,
)
from replicas.layers.weights import TensorSpec

sizes = st.sampled_from([1, 2, 4, 8])


def _assemble(spec: TensorSpec, stored: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a loader has to do with a spec, written out."""
    pieces = []
    for source, full_shape in zip(spec.sources, spec.full_shapes, strict=True):
        whole = stored[source.name]
        assert tuple(whole.shape) == full_shape
        stop = whole.shape[source.dim] if source.stop is None else source.stop
        start = source.start or 0
        piece = whole.narrow(source.dim, start, stop - start)
        pieces.append(piece.t() if source.transpose else piece)
    joined = torch.cat(pieces)
    padding = torch.zeros(spec.shape[0] - joined.shape[0], *spec.shape[1:])
    local = torch.cat((joined, padding))
    assert tuple(local.shape) == spec.shape
    return local


def _shards(size: int) -> list[Shard]:
    return [Shard(rank=rank, size=size) for rank in range(size)]


@given(sizes, st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_column_pieces_are_the_whole(
    size: int, heads: int, head_dim: int, transposed: bool
) -> None:
    features = heads * size * head_dim
    whole = torch.randn(features, 3)
    stored = {"a.weight": whole.t() if transposed else whole, "a.bias": torch.randn(features)}
    piece = (Piece(name="a", out_features=features, unit=head_dim),)
    weights = [
        _assemble(column_weight("up", piece, 3, shard, transposed=transposed), stored)
        for shard in _shards(size)
    ]
    biases = [_assemble(column_bias("up", piece, shard), stored) for shard in _shards(size)]
    assert torch.equal(torch.cat(weights), whole)
    assert torch.equal(torch.cat(biases), stored["a.bias"])


@given(sizes, st.integers(1, 6), st.booleans())
def test_row_pieces_are_the_whole(size: int, share: int, transposed: bool) -> None:
    whole = torch.randn(5, share * size)
    stored = {"a.weight": whole.t() if transposed else whole}
    pieces = [
        _assemble(row_weight("down", "a", (5, share * size), shard, transposed=transposed), stored)
        for shard in _shards(size)
    ]
    assert torch.equal(torch.cat(pieces, dim=1), whole)


@given(sizes, st.integers(1, 40))
def test_vocabulary_is_padded_with_zero_rows(size: int, vocab_size: int) -> None:
    whole = torch.randn(vocab_size, 3)
    specs = [vocabulary("tokens", "t", (vocab_size, 3), shard) for shard in _shards(size)]
    joined = torch.cat([_assemble(spec, {"t": whole}) for spec in specs])
    assert len({spec.shape for spec in specs}) == 1
    assert torch.equal(joined[:vocab_size], whole)
    assert not joined[vocab_size:].any()
    assert joined.shape[0] - vocab_size < size


@given(sizes, sizes, st.integers(1, 3))
def test_query_heads_find_their_kv_head_at_home(size: int, kv_heads: int, groups: int) -> None:
    """Also when heads are fewer than ranks and neighbours hold copies."""
    heads = kv_heads * groups * size
    for shard in _shards(size):
        first, last = shard.span(heads)
        kv_first, kv_last = shard.span(kv_heads)
        local_group = (last - first) // (kv_last - kv_first)
        for index in range(last - first):
            assert kv_first + index // local_group == (first + index) // (heads // kv_heads)


@given(sizes, st.integers(1, 3))
def test_fused_pieces_of_one_tensor(size: int, heads_each: int) -> None:
    """GPT-2: q, k and v side by side in one (in, out) tensor."""
    dim = heads_each * size * 2
    stored = {"c.weight": torch.randn(3, 3 * dim), "c.bias": torch.randn(3 * dim)}
    pieces = tuple(
        Piece(name="c", out_features=dim, unit=2, offset=part * dim, stored_out=3 * dim)
        for part in range(3)
    )
    locals_ = [
        _assemble(column_weight("qkv", pieces, 3, shard, transposed=True), stored).chunk(3)
        for shard in _shards(size)
    ]
    rebuilt = torch.cat([torch.cat([local[part] for local in locals_]) for part in range(3)])
    assert torch.equal(rebuilt, stored["c.weight"].t())
    biases = [
        _assemble(column_bias("qkv", pieces, shard), stored).chunk(3) for shard in _shards(size)
    ]
    rebuilt = torch.cat([torch.cat([local[part] for local in biases]) for part in range(3)])
    assert torch.equal(rebuilt, stored["c.bias"])
