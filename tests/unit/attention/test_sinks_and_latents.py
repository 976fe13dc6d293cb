"""What single families ask of backends: sinks in the softmax, one latent as key and value."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from replicas.attention.backend import AttentionMetadata, AttentionSpec
from replicas.attention.cpu import CpuAttention
from replicas.attention.cpu_paged import CpuPagedAttention
from replicas.attention.torch_ref import TorchReferenceAttention
from replicas.kernels.cpu_ops import CpuKernels
from tests.support.stepping import metadata_for

BLOCK_SIZE, NUM_BLOCKS = 4, 24
SPEC = AttentionSpec(
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    scale=0.25,
    block_size=BLOCK_SIZE,
    dtype="float32",
    device="cpu",
)
LATENT = dataclasses.replace(SPEC, num_kv_heads=1, shared_plane=True)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
requests = st.lists(
    st.tuples(st.one_of(st.just(1), st.integers(1, 9)), st.integers(0, 12)), min_size=1, max_size=4
)


def _metadata(parts: list[tuple[int, int]]) -> AttentionMetadata:
    lens = [query + before for query, before in parts]
    free = iter(range(NUM_BLOCKS))
    tables = [[next(free) for _ in range(-(-size // BLOCK_SIZE))] for size in lens]
    return metadata_for([query for query, _ in parts], lens, tables, BLOCK_SIZE)


def _noise(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@given(
    parts=requests,
    window=st.one_of(st.none(), st.integers(1, 12)),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_sinks_equal_the_oracle(
    parts: list[tuple[int, int]], window: int | None, dtype: torch.dtype
) -> None:
    tokens = sum(query for query, _ in parts)
    query = _noise(tokens, 6, 16, seed=1, dtype=dtype)
    key, value = (_noise(tokens, 2, 16, seed=seed, dtype=dtype) for seed in (2, 3))
    sinks = 2 * _noise(6, seed=4, dtype=dtype)
    outputs = [
        backend(dataclasses.replace(SPEC, sinks=True)).forward(
            query,
            key,
            value,
            _noise(2, NUM_BLOCKS, BLOCK_SIZE, 2, 16, seed=5, dtype=dtype),
            _metadata(parts),
            window,
            sinks,
        )
        for backend in (TorchReferenceAttention, CpuAttention)
    ]
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(outputs[1], outputs[0], atol=tolerance, rtol=tolerance)


def test_a_sink_takes_its_share_of_the_softmax() -> None:
    """One token that sees only itself: exp(score) / (exp(score) + exp(sink)) of its value."""
    query, key, value = (_noise(1, heads, 16, seed=heads) for heads in (6, 2, 3))
    value = value[:, :2]
    sinks = torch.tensor([-100.0, -1.0, 0.0, 1.0, 3.0, 100.0])
    cache = torch.zeros(2, NUM_BLOCKS, BLOCK_SIZE, 2, 16)
    metadata = _metadata([(1, 0)])
    output = CpuAttention(SPEC).forward(query, key, value, cache, metadata, None, sinks)
    score_H = (query[0] * key[0].repeat_interleave(3, dim=0)).sum(-1) * SPEC.scale
    share_H1 = torch.sigmoid(score_H - sinks)[:, None]
    expected = share_H1 * value[0].repeat_interleave(3, dim=0)
    torch.testing.assert_close(output[0], expected, atol=1e-6, rtol=1e-5)


def test_paged_kernels_leave_sinks_to_others() -> None:
    assert CpuPagedAttention.why_not(dataclasses.replace(SPEC, sinks=True)) == [
        "it knows no attention sinks"
    ]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_one_plane_serves_as_keys_and_values(cpu_kernels: CpuKernels, dtype: torch.dtype) -> None:
    spec = dataclasses.replace(LATENT, dtype=str(dtype).removeprefix("torch."))
    parts = [(5, 0), (1, 9), (3, 4)]
    query = _noise(9, 6, 16, seed=1, dtype=dtype)
    latent = _noise(9, 1, 16, seed=2, dtype=dtype)
    backends = (
        TorchReferenceAttention(spec),
        CpuAttention(spec),
        CpuPagedAttention(spec, cpu_kernels.library),
    )
    outputs, planes = [], []
    for backend in backends:
        plane = _noise(1, NUM_BLOCKS, BLOCK_SIZE, 1, 16, seed=3, dtype=dtype)
        shared = plane.expand(2, -1, -1, -1, -1)
        outputs.append(backend.forward(query, latent, latent, shared, _metadata(parts), None))
        planes.append(plane)
    for output, plane in zip(outputs[1:], planes[1:], strict=True):
        assert torch.equal(plane, planes[0])
        torch.testing.assert_close(output, outputs[0], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
