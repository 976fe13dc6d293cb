"""The Triton backend in Triton's interpreter: oracle, and no influence of neighbours and chunks."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch

from replicas.attention.backend import AttentionMetadata, AttentionSpec
from replicas.attention.torch_ref import TorchReferenceAttention
from replicas.attention.triton_paged import TritonPagedAttention
from tests.support.stepping import metadata_for

pytest.importorskip("triton", reason="Triton's kernels need triton (part of the dev extra)")

NUM_BLOCKS = 96
TOLERANCE = {"float32": 2e-5, "float16": 4e-3}


@dataclass(frozen=True, kw_only=True)
class Step:
    """Requests as (query tokens, tokens before them)."""

    requests: tuple[tuple[int, int], ...]
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 16
    block_size: int = 16
    window: int | None = None
    dtype: str = "float32"

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(
            num_heads=self.kv_heads * self.group,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            scale=0.3,
            block_size=self.block_size,
            dtype=self.dtype,
            device="cpu",
        )

    def metadata(self) -> AttentionMetadata:
        free = list(range(NUM_BLOCKS))
        random.Random(1).shuffle(free)
        lens = [query + before for query, before in self.requests]
        tables = [[free.pop() for _ in range(-(-size // self.block_size))] for size in lens]
        return metadata_for([q for q, _ in self.requests], lens, tables, self.block_size)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(2)
        tokens = sum(query for query, _ in self.requests)
        shapes = [
            (tokens, self.kv_heads * self.group, self.head_dim),
            (tokens, self.kv_heads, self.head_dim),
            (tokens, self.kv_heads, self.head_dim),
            (2, NUM_BLOCKS, self.block_size, self.kv_heads, self.head_dim),
        ]
        dtype = getattr(torch, self.dtype)
        return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


# Contexts on both sides of a segment (256) and of a tile (64).
STEPS = [
    Step(requests=((1, 0), (1, 5), (1, 255), (1, 300))),
    Step(requests=((5, 0), (1, 70), (70, 3), (2, 254)), group=1, kv_heads=3),
    Step(requests=((40, 250), (1, 520)), group=3, head_dim=24, block_size=16),
    Step(requests=((9, 260), (1, 290), (1, 12)), window=33),
    Step(requests=((3, 4), (1, 17)), window=1, block_size=4, dtype="float16"),
    Step(requests=((20, 11), (1, 64)), head_dim=64, group=4, kv_heads=1, dtype="float16"),
]


@pytest.mark.parametrize("step", STEPS, ids=range(len(STEPS)))
def test_equals_the_oracle(step: Step) -> None:
    query, key, value, cache = step.tensors()
    expected_cache = cache.clone()
    expected = TorchReferenceAttention(step.spec).forward(
        query, key, value, expected_cache, step.metadata(), step.window
    )
    output = TritonPagedAttention(step.spec).forward(
        query, key, value, cache, step.metadata(), step.window
    )
    assert torch.equal(cache, expected_cache)
    tolerance = TOLERANCE[step.dtype]
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("step", [STEPS[1], STEPS[3]], ids=["all", "window"])
def test_neighbours_change_no_bit(step: Step) -> None:
    backend = TritonPagedAttention(step.spec)
    query, key, value, cache = step.tensors()
    metadata = step.metadata()
    together = backend.forward(query, key, value, cache, metadata, step.window)
    for index, (count, before) in enumerate(step.requests):
        begin, end = metadata.query_start[index : index + 2]
        table = metadata.block_tables_RN[index].tolist()
        alone = backend.forward(
            query[begin:end],
            key[begin:end],
            value[begin:end],
            cache,
            metadata_for([count], [count + before], [table], step.block_size),
            step.window,
        )
        assert torch.equal(alone, together[begin:end])


def test_fused_projections_are_read_in_place() -> None:
    """Queries, keys and values as views of one fused row, as the model hands them over."""
    step = Step(requests=((4, 9), (1, 30)))
    query, key, value, cache = step.tensors()
    fused = torch.cat([part.flatten(1) for part in (query, key, value)], dim=1)
    parts = fused.view(fused.shape[0], -1, step.head_dim).split([4, 2, 2], dim=1)
    backend = TritonPagedAttention(step.spec)
    apart = backend.forward(query, key, value, cache.clone(), step.metadata(), None)
    views = backend.forward(*parts, cache, step.metadata(), None)
    assert torch.equal(views, apart)


def test_padding_rows_store_nothing() -> None:
    step = Step(requests=((1, 3), (1, 5)))
    _, key, value, cache = step.tensors()
    before = cache.clone()
    from replicas.kernels.gpu.paged_attention import write_slots

    write_slots(key, value, cache, torch.tensor([-1, 7]))
    changed = (cache != before).flatten(3).any(-1).any(0).flatten().nonzero().flatten()
    assert changed.tolist() == [7]


def test_every_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    spec = AttentionSpec(
        num_heads=3,
        num_kv_heads=2,
        head_dim=8,
        scale=1.0,
        block_size=4,
        dtype="float64",
        device="cpu",
    )
    reasons = " / ".join(TritonPagedAttention.why_not(spec))
    for part in ("not on cpu", "not float64", "do not share"):
        assert part in reasons
