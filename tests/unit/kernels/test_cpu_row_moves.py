"""Plans of rows and rows taken apart by the compiled kernels: what torch makes of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.base.errors import InternalError
from moe.exchange.wire import Dispatch, WireFormat
from moe.plan import NOWHERE
from moe.row_moves import TorchRowMoves
from replicas.kernels.cpu_ops import CpuKernels
from replicas.kernels.cpu_row_moves import CpuRowMoves


@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**20),
    num_rows=st.integers(0, 40),
    top_k=st.integers(1, 9),
    num_experts=st.integers(1, 30),
    num_members=st.integers(1, 70),
    turned=st.booleans(),
)
def test_plans_as_torch(
    cpu_kernels: CpuKernels,
    seed: int,
    num_rows: int,
    top_k: int,
    num_experts: int,
    num_members: int,
    turned: bool,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (top_k, num_rows) if turned else (num_rows, top_k)
    experts = torch.randint(NOWHERE, num_experts, shape, generator=generator)
    experts = experts.t() if turned else experts
    member_S = torch.randint(NOWHERE, num_members, (num_experts + 1,), generator=generator)
    member_S[-1] = NOWHERE
    ours = CpuRowMoves(cpu_kernels.library).plan(experts, member_S, num_members)
    torchs = TorchRowMoves().plan(experts, member_S, num_members)
    assert torch.equal(ours.row_R, torchs.row_R)
    assert (ours.counts, ours.num_rows) == (torchs.counts, torchs.num_rows)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**20),
    counts=st.lists(st.integers(0, 7), min_size=1, max_size=4),
    dim=st.sampled_from([1, 3, 64, 130]),
    top_k=st.sampled_from([1, 8, 70]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    dispatch=st.sampled_from(list(Dispatch)),
)
def test_takes_rows_apart_as_torch(
    cpu_kernels: CpuKernels,
    seed: int,
    counts: list[int],
    dim: int,
    top_k: int,
    dtype: torch.dtype,
    dispatch: Dispatch,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    format = WireFormat(dim=dim, dtype=dtype, top_k=top_k, dispatch=dispatch)
    num_rows = sum(counts)
    hidden = torch.randn((num_rows, dim), generator=generator).to(dtype)
    experts = torch.randint(NOWHERE, 99, (num_rows, max(1, top_k - 1)), generator=generator)
    weights = torch.rand(experts.shape, generator=generator)
    pieces = [piece.clone() for piece in format.pack(hidden, experts, weights).split(counts)]
    ours, torchs = CpuRowMoves(cpu_kernels.library), TorchRowMoves()
    got, expected = ours.split(format, pieces), torchs.split(format, pieces)
    assert torch.equal(got.hidden_AD, expected.hidden_AD)
    assert got.hidden_AD.dtype == dtype
    assert torch.equal(got.weight_AK, expected.weight_AK)
    assert torch.equal(got.expert_AK, expected.expert_AK)
    assert torch.equal(ours.experts(format, pieces), expected.expert_AK)
    assert dispatch is not Dispatch.EXACT or torch.equal(got.hidden_AD, hidden)


def test_what_is_no_expert_or_no_row_of_the_format_is_refused(cpu_kernels: CpuKernels) -> None:
    moves = CpuRowMoves(cpu_kernels.library)
    member_S = torch.tensor([0, 1, NOWHERE])
    with pytest.raises(InternalError, match="none of 2, or with none of 2"):
        moves.plan(torch.tensor([[2]]), member_S, 2)
    with pytest.raises(InternalError, match="none of 2, or with none of 1"):
        moves.plan(torch.tensor([[1]]), member_S, 1)
    with pytest.raises(InternalError, match="Moves of rows got"):
        moves.plan(torch.tensor([[1]], dtype=torch.int32), member_S, 2)
    format = WireFormat(dim=4, dtype=torch.float32, top_k=1)
    with pytest.raises(InternalError, match="Rows of 23 bytes are none of 24"):
        moves.split(format, [torch.empty((2, 23), dtype=torch.uint8)])
    with pytest.raises(InternalError, match="Moves of rows got"):
        moves.experts(format, [torch.empty((24, 2), dtype=torch.uint8).t()])
