"""KV cache allocation and block copies in order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.base.errors import DeviceOutOfMemoryError
from replicas.worker.kv_tensors import KvCacheSpec, allocate_kv_caches, copy_blocks

NUM_BLOCKS = 6
block = st.integers(0, NUM_BLOCKS - 1)


def spec(num_blocks: int = NUM_BLOCKS) -> KvCacheSpec:
    return KvCacheSpec(
        num_layers=3,
        num_blocks=num_blocks,
        block_size=4,
        num_kv_heads=2,
        head_dim=8,
        dtype=torch.bfloat16,
    )


def test_shape_dtype_and_zeros() -> None:
    caches = allocate_kv_caches(spec(), torch.device("cpu"))
    assert len(caches) == 3
    for cache in caches:
        assert cache.shape == (2, NUM_BLOCKS, 4, 2, 8)
        assert cache.dtype is torch.bfloat16
        assert not cache.any()
    assert len({cache.data_ptr() for cache in caches}) == 3


@given(copies=st.lists(st.tuples(block, block), max_size=12))
def test_copies_act_one_after_another(copies: list[tuple[int, int]]) -> None:
    caches = [torch.randn(2, NUM_BLOCKS, 4, 2, 8) for _ in range(2)]
    expected = [cache.clone() for cache in caches]
    for source, target in copies:
        for cache in expected:
            cache[:, target] = cache[:, source].clone()
    copy_blocks(caches, copies)
    for cache, wanted in zip(caches, expected, strict=True):
        assert torch.equal(cache, wanted)


def test_too_large_a_cache_is_a_typed_error() -> None:
    with pytest.raises(DeviceOutOfMemoryError, match="allocating 1000000000000 KV cache blocks"):
        allocate_kv_caches(spec(10**12), torch.device("cpu"))
