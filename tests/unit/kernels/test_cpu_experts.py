"""All experts in one compiled call: the bits of one by one, in any batch, on any thread count."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.base.errors import InternalError
from moe.exchange.base import Arrivals
from moe.experts import DOWN, DOWN_BIAS, UP, UP_BIAS, ExpertRunner
from moe.spec import GateSpec, MoeSpec
from replicas.kernels.cpu_ops import CpuKernels
from replicas.layers.mixture import ExpertUnits, KernelMath
from replicas.layers.weights import ResidentWeights
from tests.support.compiled_kernels import lesser_library, threads

DTYPES = [torch.float32, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
HELD = (3, 0, 7, 1)
"""Logical experts by slot, not in order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """Packed experts of one layer and what computes with them."""

    spec: MoeSpec
    weights: ResidentWeights
    math: KernelMath
    dim: int
    dtype: torch.dtype
    down_bias: bool = True

    def rows(self, count: int, top_k: int, seed: int = 0, *, skewed: bool = False) -> Arrivals:
        """Random rows and routes; some go to other ranks."""
        generator = torch.Generator().manual_seed(seed)
        scores = torch.rand((count, len(HELD) + 2), generator=generator)
        if skewed:
            scores[:, 1] += 1
        return Arrivals(
            hidden_AD=torch.randn((count, self.dim), generator=generator).to(self.dtype),
            slot_AK=scores.argsort(descending=True)[:, :top_k].contiguous() - 1,
            weight_AK=torch.rand((count, top_k), generator=generator),
            num_local=len(HELD),
        )

    def together(self, arrivals: Arrivals, held: tuple[int, ...] = HELD) -> torch.Tensor:
        """The runner's own choice, which has to be the one call."""
        experts = ExpertUnits(self.weights, 0)
        made = self.math.grouped([experts.acquire(e) for e in held], held, down_bias=self.down_bias)
        assert made is not None
        whole = made.forward(arrivals.hidden_AD, arrivals.slot_AK, arrivals.weight_AK)
        runner = ExpertRunner(self.math, down_bias=self.down_bias)
        assert torch.equal(runner.forward(arrivals, held, experts), whole)
        return whole

    def one_by_one(self, arrivals: Arrivals) -> torch.Tensor:
        runner = ExpertRunner(self.math, down_bias=self.down_bias)
        return runner.one_by_one(arrivals, HELD, ExpertUnits(self.weights, 0))


def layer(
    kernels: CpuKernels,
    dtype: torch.dtype,
    dim: int = 96,
    ffn: int = 160,
    *,
    biased: bool = False,
    glu_limit: float = 0.0,
    down_bias: bool = True,
) -> Layer:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(dtype)

    units: dict[str, Mapping[str, torch.Tensor]] = {}
    for expert in HELD:
        tensors = kernels.pack(UP, draw(2 * ffn, dim)) | kernels.pack(DOWN, draw(dim, ffn))
        if biased:
            tensors |= {UP_BIAS: draw(2 * ffn), DOWN_BIAS: draw(dim)}
        units[f"layer.0.expert.{expert}"] = tensors
    spec = MoeSpec(
        gate=GateSpec(num_experts=8, top_k=2),
        ffn_dim=ffn,
        expert_bias=biased,
        glu_limit=glu_limit,
    )
    return Layer(
        spec=spec,
        weights=ResidentWeights(units),
        math=KernelMath(kernels, spec, "silu"),
        dim=dim,
        dtype=dtype,
        down_bias=down_bias,
    )


@settings(max_examples=60)
@given(
    rows=st.one_of(st.integers(1, 40), st.sampled_from([64, 129, 300])),
    dim=st.sampled_from([32, 50, 96, 256]),
    blocks=st.integers(1, 12),
    top_k=st.integers(1, 4),
    dtype=st.sampled_from(DTYPES),
    biased=st.booleans(),
    down_bias=st.booleans(),
    glu_limit=st.sampled_from([0.0, 0.7]),
    num_threads=st.integers(1, 3),
    seed=st.integers(0, 2**20),
)
def test_one_call_has_the_bits_of_one_by_one(
    cpu_kernels: CpuKernels,
    rows: int,
    dim: int,
    blocks: int,
    top_k: int,
    dtype: torch.dtype,
    biased: bool,
    down_bias: bool,
    glu_limit: float,
    num_threads: int,
    seed: int,
) -> None:
    experts = layer(
        cpu_kernels,
        dtype,
        dim,
        blocks * cpu_kernels.library.width,
        biased=biased,
        glu_limit=glu_limit,
        down_bias=down_bias,
    )
    arrivals = experts.rows(rows, top_k, seed, skewed=seed % 3 == 0)
    with threads(num_threads):
        assert torch.equal(experts.together(arrivals), experts.one_by_one(arrivals))


@each_dtype
def test_more_rows_than_one_wave_and_one_piece_hold(
    cpu_kernels: CpuKernels, dtype: torch.dtype
) -> None:
    experts = layer(cpu_kernels, dtype, 32, 48)
    for skewed in (False, True):
        arrivals = experts.rows(1500, 3, skewed=skewed)
        with threads(2):
            assert torch.equal(experts.together(arrivals), experts.one_by_one(arrivals))


@each_dtype
def test_a_row_is_the_same_in_every_batch(cpu_kernels: CpuKernels, dtype: torch.dtype) -> None:
    experts = layer(cpu_kernels, dtype)
    arrivals = experts.rows(200, 2)
    whole = experts.together(arrivals)
    for start, stop in ((0, 1), (7, 9), (100, 116), (3, 36), (0, 97), (60, 200)):
        part = dataclasses.replace(
            arrivals,
            hidden_AD=arrivals.hidden_AD[start:stop],
            slot_AK=arrivals.slot_AK[start:stop],
            weight_AK=arrivals.weight_AK[start:stop],
        )
        with threads(1 + start % 3):
            assert torch.equal(experts.together(part), whole[start:stop]), (start, stop)


@each_dtype
def test_slots_change_no_bit(cpu_kernels: CpuKernels, dtype: torch.dtype) -> None:
    experts = layer(cpu_kernels, dtype)
    arrivals = experts.rows(40, 4)
    other = (7, 3, 1, 0)
    # The slot of the same expert in the other order; what is elsewhere stays there.
    move = torch.tensor([*(other.index(expert) for expert in HELD), 9, -1])
    moved = dataclasses.replace(arrivals, slot_AK=move[arrivals.slot_AK])
    assert torch.equal(experts.together(moved, other), experts.together(arrivals))


@each_dtype
def test_rows_that_visit_nobody_here_are_zero(cpu_kernels: CpuKernels, dtype: torch.dtype) -> None:
    experts = layer(cpu_kernels, dtype)
    arrivals = experts.rows(5, 2)
    elsewhere = dataclasses.replace(arrivals, slot_AK=torch.full((5, 2), 4))
    assert not experts.together(elsewhere).any()
    none = dataclasses.replace(
        arrivals,
        hidden_AD=arrivals.hidden_AD[:0],
        slot_AK=arrivals.slot_AK[:0],
        weight_AK=arrivals.weight_AK[:0],
    )
    assert experts.together(none).shape == (0, experts.dim)


def test_what_cannot_go_together_goes_one_by_one(cpu_kernels: CpuKernels) -> None:
    odd = layer(cpu_kernels, torch.bfloat16, 32, 3 * cpu_kernels.library.width // 2)
    experts = ExpertUnits(odd.weights, 0)
    tensors = [experts.acquire(expert) for expert in HELD]
    assert odd.math.grouped(tensors, HELD, down_bias=True) is None
    plain = {UP: torch.ones(32, 8), DOWN: torch.ones(8, 16)}
    assert odd.math.grouped([plain], (0,), down_bias=True) is None
    whole = layer(cpu_kernels, torch.bfloat16, 32, 32)
    math = KernelMath(cpu_kernels, whole.spec, "gelu")
    tensors = [ExpertUnits(whole.weights, 0).acquire(expert) for expert in HELD]
    assert math.grouped(tensors, HELD, down_bias=True) is None


def test_wrong_rows_are_refused(cpu_kernels: CpuKernels) -> None:
    experts = layer(cpu_kernels, torch.bfloat16)
    arrivals = experts.rows(4, 2)
    for wrong in (
        {"hidden_AD": arrivals.hidden_AD.float()},
        {"hidden_AD": arrivals.hidden_AD[:, :64]},
        {"slot_AK": arrivals.slot_AK.int()},
        {"weight_AK": arrivals.weight_AK[:, :1]},
    ):
        with pytest.raises(InternalError, match="got rows"):
            experts.together(dataclasses.replace(arrivals, **wrong))


def test_moved_experts_are_looked_up_anew(cpu_kernels: CpuKernels) -> None:
    experts = layer(cpu_kernels, torch.float32)
    units = ExpertUnits(experts.weights, 0)
    runner = ExpertRunner(experts.math)
    arrivals = dataclasses.replace(experts.rows(6, 2), num_local=2)
    first = runner.forward(arrivals, HELD[:2], units)
    runner.forward(arrivals, HELD[2:], units)
    assert not torch.equal(runner.forward(arrivals, HELD[2:], units), first)
    assert torch.equal(runner.forward(arrivals, HELD[:2], units), first)


@pytest.mark.parametrize("march", ["x86-64-v3", "x86-64-v4", "native"])
@each_dtype
def test_without_matrix_tiles(cpu_kernels: CpuKernels, march: str, dtype: torch.dtype) -> None:
    experts = layer(CpuKernels(lesser_library(march)), dtype, 50, 48)
    for rows in (1, 3, 40, 200):
        arrivals = experts.rows(rows, 3)
        with threads(2):
            assert torch.equal(experts.together(arrivals), experts.one_by_one(arrivals))
