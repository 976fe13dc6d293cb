"""Triton's routed experts in its interpreter: against the experts one by one, and in any batch."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cluster.base.errors import InternalError
from moe.exact_sums import BITS, MAX_SHIFT, settle
from moe.exchange.base import Arrivals
from moe.experts import DOWN, DOWN_BIAS, UP, UP_BIAS, ExpertRunner
from moe.spec import GateSpec, MoeSpec
from replicas.kernels.triton_ops import TritonKernels
from replicas.layers.mixture import ExpertUnits, KernelMath
from replicas.layers.weights import ResidentWeights

pytest.importorskip("triton", reason="Triton's kernels need triton (part of the dev extra)")

HELD = (3, 0, 7)
DIM = 40


def noise(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (values * shape[-1] ** -0.5).to(dtype)


def weights(dtype: torch.dtype, ffn: int, *, biased: bool) -> ResidentWeights:
    units = {}
    for expert in HELD:
        tensors = {
            UP: noise(2 * ffn, DIM, dtype=dtype, seed=expert),
            DOWN: noise(DIM, ffn, dtype=dtype, seed=expert + 10),
        }
        if biased:
            tensors[UP_BIAS] = noise(2 * ffn, dtype=dtype, seed=expert + 20)
            tensors[DOWN_BIAS] = noise(DIM, dtype=dtype, seed=expert + 30)
        units[f"layer.0.expert.{expert}"] = tensors
    return ResidentWeights(units)


def arrivals(rows: int, top_k: int, dtype: torch.dtype) -> Arrivals:
    """Random rows and routes; some go to other ranks."""
    generator = torch.Generator().manual_seed(rows)
    slots = torch.rand((rows, len(HELD) + 2), generator=generator).argsort()[:, :top_k] - 1
    return Arrivals(
        hidden_AD=(4 * noise(rows, DIM, dtype=torch.float32, seed=5)).to(dtype),
        slot_AK=slots,
        weight_AK=torch.rand((rows, top_k), generator=generator),
        num_local=len(HELD),
    )


def runner(kernels: TritonKernels, glu_limit: float, *, down_bias: bool = True) -> ExpertRunner:
    spec = MoeSpec(gate=GateSpec(num_experts=8, top_k=2), ffn_dim=1, glu_limit=glu_limit)
    return ExpertRunner(KernelMath(kernels, spec, "silu"), down_bias=down_bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize(
    ("biased", "down_bias", "glu_limit"), [(False, True, 0.0), (True, True, 0.5), (True, False, 0)]
)
def test_as_one_by_one(
    dtype: torch.dtype, rows: int, biased: bool, down_bias: bool, glu_limit: float
) -> None:
    home, given = weights(dtype, 72, biased=biased), arrivals(rows, 2, dtype)
    experts = runner(TritonKernels(), glu_limit, down_bias=down_bias)
    units = ExpertUnits(home, 0)
    tensors = [units.acquire(expert) for expert in HELD]
    assert experts._together(tensors, HELD) is not None
    actual = experts.forward(given, HELD, units)
    expected = experts.one_by_one(given, HELD, units)
    tolerance = 1e-5 if dtype is torch.float32 else 4e-3
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def test_a_row_is_the_same_in_every_batch_and_slot() -> None:
    home, given = weights(torch.float16, 72, biased=False), arrivals(70, 3, torch.float16)
    experts, units = runner(TritonKernels(), 0.0), ExpertUnits(home, 0)
    whole = experts.forward(given, HELD, units)
    for start, stop in ((0, 1), (3, 9), (30, 70)):
        part = dataclasses.replace(
            given,
            hidden_AD=given.hidden_AD[start:stop],
            slot_AK=given.slot_AK[start:stop],
            weight_AK=given.weight_AK[start:stop],
        )
        assert torch.equal(experts.forward(part, HELD, units), whole[start:stop])
    other = (7, 3, 0)
    move = torch.tensor([*(other.index(expert) for expert in HELD), 9, -1])
    moved = dataclasses.replace(given, slot_AK=move[given.slot_AK])
    assert torch.equal(experts.forward(moved, other, units), whole)


def test_rows_are_settled_and_summed_exactly() -> None:
    """The bits of `moe.exact_sums`, for rows longer than what one program adds."""
    from replicas.kernels.gpu import expert_kernels  # imports Triton

    generator = torch.Generator().manual_seed(3)
    products = torch.randn((7, 1500), generator=generator)
    products *= 10.0 ** torch.randint(-4, 4, (7, 1), generator=generator)
    products[2, 1300], products[3] = float("inf"), 0.0
    weight_M = torch.rand(7, generator=generator) ** 8
    pair_AK = torch.tensor([[0, 4, 6], [1, 3, 8], [2, 5, 9]])
    heaviest_A = torch.tensor([1.0, float(weight_M[1]), 2.0])
    output = torch.full((3, 1500), 7.0, dtype=torch.float64)
    expert_kernels.expert_sum_kernel[(3, 2)](
        *(products, pair_AK, weight_M, heaviest_A, torch.tensor([7]), output, 1500),
        **{"TOP_K": 3, "WIDTH": 1024, "BITS": BITS, "MAX_SHIFT": MAX_SHIFT},
    )
    for row, pairs in enumerate(([0, 4, 6], [1, 3], [2, 5])):
        settled = settle(products[pairs], weight_M[pairs], heaviest_A[row].expand(len(pairs)))
        expected = settled.double().sum(dim=0)
        assert torch.equal(output[row].nan_to_num(5.0), expected.nan_to_num(5.0))
    assert output[2].isnan().all()


def test_rows_for_nobody_here_are_zero() -> None:
    home, given = weights(torch.float32, 72, biased=False), arrivals(4, 2, torch.float32)
    experts, units = runner(TritonKernels(), 0.0), ExpertUnits(home, 0)
    elsewhere = dataclasses.replace(given, slot_AK=torch.full((4, 2), 3))
    assert not experts.forward(elsewhere, HELD, units).any()
    nothing = dataclasses.replace(
        given,
        hidden_AD=given.hidden_AD[:0],
        slot_AK=given.slot_AK[:0],
        weight_AK=given.weight_AK[:0],
    )
    assert experts.forward(nothing, HELD, units).shape == (0, DIM)
    wrong = dataclasses.replace(given, hidden_AD=given.hidden_AD.half())
    with pytest.raises(InternalError, match="got rows"):
        experts.forward(wrong, HELD, units)


def test_experts_stored_in_another_way_go_one_by_one() -> None:
    units = ExpertUnits(weights(torch.float32, 72, biased=False), 0)
    tensors = [units.acquire(expert) for expert in HELD]
    math = runner(TritonKernels(), 0.0)
    codes = [{**each, UP + ".fp8": each[UP]} for each in tensors]
    assert math._together(codes, HELD) is None
    uneven = [tensors[0], {**tensors[1], DOWN: tensors[1][DOWN][:8]}, tensors[2]]
    assert math._together(uneven, HELD) is None
