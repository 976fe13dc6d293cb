"""The Triton backend in Triton's interpreter: oracle, and no influence of neighbours and chunks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from replicas.attention.backend import AttentionSpec
from replicas.attention.torch_ref import TorchReferenceAttention
from replicas.attention.triton_paged import TritonPagedAttention
from tests.support.attention_cases import AttentionCase

pytest.importorskip("triton", reason="Triton's kernels need triton (part of the dev extra)")

TOLERANCE = {"float32": 2e-5, "float16": 4e-3}


def Step(**fields: Any) -> AttentionCase:  # noqa: N802 - reads as the class it makes
    """A case with sizes that suit Triton's tiles."""
    return AttentionCase(**{"head_dim": 16, "block_size": 16, "seed": 2} | fields)


# Contexts on both sides of a segment (256) and of a tile (64).
STEPS = [
    Step(requests=((1, 0), (1, 5), (1, 255), (1, 300))),
    Step(requests=((5, 0), (1, 70), (70, 3), (2, 254)), group=1, kv_heads=3),
    Step(requests=((40, 250), (1, 520)), group=3, head_dim=24, block_size=16),
    Step(requests=((9, 260), (1, 290), (1, 12)), window=33),
    Step(requests=((3, 4), (1, 17)), window=1, block_size=4, dtype="float16"),
    Step(requests=((20, 11), (1, 64)), head_dim=64, group=4, kv_heads=1, dtype="float16"),
    # More query heads than a tile has rows; heads wider than 128; heads of two parts.
    Step(requests=((3, 260), (1, 40)), head_dim=32, group=71, kv_heads=1),
    Step(requests=((9, 250), (1, 70), (1, 1)), head_dim=144, group=20, kv_heads=1),
    Step(requests=((7, 30), (1, 300), (1, 2)), sinks=True, group=3),
    Step(requests=((7, 30), (1, 40)), sinks=True, window=9, dtype="float16"),
    Step(requests=((6, 255), (1, 300)), head_dim=40, group=5, kv_heads=1, shared_plane=True),
]


@pytest.mark.parametrize("step", STEPS, ids=range(len(STEPS)))
def test_equals_the_oracle(step: AttentionCase) -> None:
    expected, expected_cache = step.run(TorchReferenceAttention(step.spec))
    output, cache = step.run(TritonPagedAttention(step.spec))
    assert torch.equal(cache, expected_cache)
    tolerance = TOLERANCE[step.dtype]
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("step", [STEPS[index] for index in (1, 3, 8, 10)])
def test_neighbours_change_no_bit(step: AttentionCase) -> None:
    backend = TritonPagedAttention(step.spec)
    together, cache = step.run(backend)
    for begin, end in itertools.pairwise(step.metadata().query_start):
        assert torch.equal(step.run_alone(backend, range(begin, end), cache), together[begin:end])


@pytest.mark.parametrize("step", [STEPS[index] for index in (6, 8, 9, 10)])
def test_a_chunk_gives_what_its_tokens_give_one_by_one(step: AttentionCase) -> None:
    """Bit for bit: both fill the same tiles."""
    backend = TritonPagedAttention(step.spec)
    together, cache = step.run(backend)
    for row in range(step.requests[0][0]):
        alone = step.run_alone(backend, range(row, row + 1), cache)
        assert torch.equal(alone, together[row : row + 1])


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
