"""Partial sums packed and added by the compiled kernels: torch's bits, whatever the numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.base.errors import InternalError
from moe.row_sums import MORE, NO_NUMBERS, RowSums, TorchRowSums
from replicas.kernels.cpu_ops import CpuKernels
from replicas.kernels.cpu_row_sums import CpuRowSums
from tests.support.compiled_kernels import threads

ODD = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, 3e38, 1.0, -(2.0**-60)]


def sums_of(seed: int, num_rows: int, dim: int, bits: int, *, odd: bool) -> torch.Tensor:
    """Multiples of some grid of each row, now and then with what is no number among them."""
    generator = torch.Generator().manual_seed(seed)
    grid = 2.0 ** torch.randint(-60, 60, (num_rows, 1), generator=generator).double()
    sums = torch.randint(-(2**bits), 2**bits + 1, (num_rows, dim), generator=generator) * grid
    if odd and sums.numel():
        places = torch.randint(sums.numel(), (3,), generator=generator)
        picks = torch.randint(len(ODD), (3,), generator=generator)
        sums.view(-1)[places] = torch.tensor(ODD, dtype=torch.float64)[picks]
    return sums


def packed_by(row_sums: RowSums, sums: torch.Tensor) -> torch.Tensor:
    packed = torch.empty((sums.shape[0], 1 + sums.shape[1]), dtype=torch.int32)
    lacks = row_sums.pack(sums, packed)
    assert lacks == bool((packed[:, 0] & MORE).any())
    return packed


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**20),
    num_rows=st.integers(0, 40),
    dim=st.sampled_from([1, 7, 64, 600, 1030]),
    bits=st.sampled_from([3, 24, 30, 45]),
    odd=st.booleans(),
    num_threads=st.integers(1, 3),
)
def test_as_torch(
    cpu_kernels: CpuKernels,
    seed: int,
    num_rows: int,
    dim: int,
    bits: int,
    odd: bool,
    num_threads: int,
) -> None:
    ours, torchs = CpuRowSums(cpu_kernels.library), TorchRowSums()
    sums = sums_of(seed, num_rows, dim, bits, odd=odd)
    with threads(num_threads):
        packed = packed_by(ours, sums)
        assert torch.equal(packed, packed_by(torchs, sums))
        target = torch.arange(num_rows) // 2
        added = [torch.zeros((num_rows // 2 + 1, dim), dtype=torch.float64) for _ in range(2)]
        ours.add(packed, target, added[0])
        torchs.add(packed, target, added[1])
    assert torch.equal(added[0].nan_to_num(7.0), added[1].nan_to_num(7.0))


@pytest.mark.parametrize("compiled", [True, False])
def test_what_fits_comes_back_and_what_does_not_says_so(
    cpu_kernels: CpuKernels, compiled: bool
) -> None:
    sums = CpuRowSums(cpu_kernels.library) if compiled else TorchRowSums()
    rows = torch.tensor([[2.0**30, 1.0], [2.0**31, 1.0], [0.0, 0.0], [float("nan"), 1.0]])
    packed = packed_by(sums, rows.double())
    assert (packed[:, 0] & 3).tolist() == [0, MORE, 0, NO_NUMBERS]
    back = torch.zeros((4, 2), dtype=torch.float64)
    sums.add(packed, torch.arange(4), back)
    assert torch.equal(back[0], rows[0].double())
    assert (back[1] - rows[1]).abs().max() <= 1.0
    assert not back[2].any()
    assert back[3].isnan().all()


@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**20),
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    num_rows=st.integers(1, 9),
    dim=st.sampled_from([1, 7, 64, 600, 1030]),
    bits=st.sampled_from([3, 24, 29, 33]),
    odd=st.booleans(),
    num_threads=st.integers(1, 3),
)
def test_joined_in_one_pass_as_added_one_by_one(
    cpu_kernels: CpuKernels,
    seed: int,
    counts: list[int],
    num_rows: int,
    dim: int,
    bits: int,
    odd: bool,
    num_threads: int,
) -> None:
    torchs = TorchRowSums()
    generator = torch.Generator().manual_seed(seed)
    copies = torch.randint(-(2**bits), 2**bits + 1, (sum(counts), dim), generator=generator)
    copies = copies.double() * 2.0 ** (seed % 90 - 45)
    if odd and copies.numel():
        copies.view(-1)[seed % copies.numel()] = ODD[seed % len(ODD)]
    target = torch.randint(num_rows, (sum(counts),), generator=generator)
    pieces = [packed_by(torchs, piece) for piece in copies.split(counts)]
    added = torch.zeros((num_rows, dim), dtype=torch.float64)
    for piece, to in zip(pieces, target.split(counts), strict=True):
        torchs.add(piece, to, added)
    lacks = any((piece[:, 0] & MORE).any() for piece in pieces)
    for row_sums in (torchs, CpuRowSums(cpu_kernels.library)):
        joined, total = torch.empty((num_rows, 1 + dim), dtype=torch.int32), added.float() * 0 + 5
        with threads(num_threads):
            whole = row_sums.join(pieces, target, joined)
            assert row_sums.total(pieces, target, total) is not lacks
        expected = packed_by(torchs, added)
        assert whole == (not lacks and not (expected[:, 0] & MORE).any())
        assert not whole or torch.equal(joined, expected)
        assert lacks or torch.equal(total.nan_to_num(7.0), added.float().nan_to_num(7.0))


def test_wrong_tensors_are_refused(cpu_kernels: CpuKernels) -> None:
    sums = CpuRowSums(cpu_kernels.library)
    packed = packed_by(sums, torch.zeros((2, 3), dtype=torch.float64))
    with pytest.raises(InternalError, match="Sums got"):
        sums.pack(torch.zeros((2, 3)), packed)
    with pytest.raises(InternalError, match="do not lie in"):
        sums.pack(torch.zeros((3, 3), dtype=torch.float64), packed)
    with pytest.raises(InternalError, match="do not lie in"):
        sums.add(packed, torch.arange(3), torch.zeros((2, 3), dtype=torch.float64))
    with pytest.raises(InternalError, match="do not belong"):
        sums.join([packed], torch.arange(3), torch.empty((2, 4), dtype=torch.int32))
    with pytest.raises(InternalError, match="do not lie in"):
        sums.total([packed], torch.arange(2), torch.empty((2, 4)))
