"""The compiled GELU against torch's, and a value's bits wherever it stands."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from cluster.base.errors import InternalError
from replicas.kernels.cpu_ops import CpuKernels
from tests.support.compiled_kernels import threads

VALUES = torch.cat((torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e-30, 90.0, -90.0])))


@pytest.mark.parametrize("with_tanh", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_torchs(cpu_kernels: CpuKernels, dtype: torch.dtype, with_tanh: bool) -> None:
    values = VALUES[None].to(dtype)
    approximate = "tanh" if with_tanh else "none"
    exact = functional.gelu(values.double(), approximate=approximate)
    near = {"atol": 2e-6, "rtol": 1e-5} if dtype is torch.float32 else {"atol": 1e-6, "rtol": 8e-3}
    ours = cpu_kernels.gelu(values, with_tanh=with_tanh)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), exact, **near)


@pytest.mark.parametrize("with_tanh", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_value_has_the_same_bits_wherever_it_stands(
    cpu_kernels: CpuKernels, dtype: torch.dtype, with_tanh: bool
) -> None:
    rows = torch.randn(301, 77, generator=torch.Generator().manual_seed(2)).to(dtype)
    with threads(3):
        whole = cpu_kernels.gelu(rows, with_tanh=with_tanh)
    for width in (1, 15, 16, 17, 77):
        for start in (0, 100, 300):
            part = rows[start : start + 1, :width]
            assert torch.equal(
                cpu_kernels.gelu(part, with_tanh=with_tanh), whole[start : start + 1, :width]
            )


def test_nan_stays_in_its_place(cpu_kernels: CpuKernels) -> None:
    rows = torch.ones(2, 21)
    rows[1, 20] = math.nan
    for with_tanh in (False, True):
        found = cpu_kernels.gelu(rows, with_tanh=with_tanh).isnan()
        assert torch.equal(found, rows.isnan())


def test_other_dtypes_are_refused(cpu_kernels: CpuKernels) -> None:
    with pytest.raises(InternalError, match="GELU"):
        cpu_kernels.gelu(torch.ones(2, 3).double(), with_tanh=True)
