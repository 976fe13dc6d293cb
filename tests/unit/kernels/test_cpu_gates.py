"""The compiled gate against the torch one, and a row's choice against the rows beside it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.base.errors import InternalError
from moe.gating import route
from moe.spec import GateSpec, GroupScore, Score
from replicas.kernels.cpu_ops import CpuKernels

SPECS = [
    GateSpec(num_experts=8, top_k=2, normalise=True),
    GateSpec(num_experts=60, top_k=4),
    GateSpec(num_experts=5, top_k=5),
    GateSpec(num_experts=128, top_k=8, normalise=True, scale=2.5),
    GateSpec(num_experts=33, top_k=4, score=Score.RAW),
    GateSpec(num_experts=160, top_k=6, num_groups=8, top_groups=3, scale=16.0),
    GateSpec(
        num_experts=256,
        top_k=8,
        score=Score.SIGMOID,
        selection_bias=True,
        num_groups=8,
        top_groups=4,
        group_score=GroupScore.TOP2_SUM,
        normalise=True,
        scale=2.5,
    ),
]
each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.num_experts}")


@each_spec
@settings(max_examples=20)
@given(rows=st.integers(0, 50), seed=st.integers(0, 2**20))
def test_as_in_torch(cpu_kernels: CpuKernels, spec: GateSpec, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_TE = 3 * torch.randn((rows, spec.num_experts), generator=generator)
    bias_E = torch.randn(spec.num_experts, generator=generator) if spec.selection_bias else None
    ids_TK, weights_TK = cpu_kernels.route(logits_TE, spec, bias_E)
    expected_ids, expected = route(logits_TE, spec, bias_E)
    assert torch.equal(ids_TK, expected_ids)
    torch.testing.assert_close(weights_TK, expected, rtol=1e-6, atol=1e-7)


@each_spec
def test_a_row_is_routed_by_itself(cpu_kernels: CpuKernels, spec: GateSpec) -> None:
    logits_TE = torch.randn((70, spec.num_experts), generator=torch.Generator().manual_seed(2))
    bias_E = torch.zeros(spec.num_experts) if spec.selection_bias else None
    ids_TK, weights_TK = cpu_kernels.route(logits_TE, spec, bias_E)
    torch.set_num_threads(2)
    try:
        assert torch.equal(cpu_kernels.route(logits_TE, spec, bias_E)[1], weights_TK)
    finally:
        torch.set_num_threads(1)
    for start, stop in ((0, 1), (3, 20), (69, 70)):
        part = cpu_kernels.route(logits_TE[start:stop], spec, bias_E)
        assert torch.equal(part[0], ids_TK[start:stop])
        assert torch.equal(part[1], weights_TK[start:stop])


@each_spec
def test_ties_go_to_the_lowest_expert_and_nothing_leaves_the_range(
    cpu_kernels: CpuKernels, spec: GateSpec
) -> None:
    bias_E = torch.zeros(spec.num_experts) if spec.selection_bias else None
    even = cpu_kernels.route(torch.zeros((3, spec.num_experts)), spec, bias_E)
    expected = route(torch.zeros((3, spec.num_experts)), spec, bias_E)
    assert torch.equal(even[0], expected[0])
    for poison in (float("nan"), float("inf"), float("-inf")):
        logits_TE = torch.full((2, spec.num_experts), poison)
        ids_TK, _ = cpu_kernels.route(logits_TE, spec, bias_E)
        assert all(len(set(row)) == spec.top_k for row in ids_TK.tolist())
        assert 0 <= int(ids_TK.min()) <= int(ids_TK.max()) < spec.num_experts


def test_other_logits_are_refused(cpu_kernels: CpuKernels) -> None:
    with pytest.raises(InternalError, match="gate of 8 experts"):
        cpu_kernels.route(torch.zeros(2, 9), SPECS[0], None)
    impossible = GateSpec(num_experts=8, top_k=9)
    with pytest.raises(InternalError, match="No token can be routed"):
        cpu_kernels.route(torch.zeros(2, 8), impossible, None)
