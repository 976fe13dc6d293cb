"""Triton's row kernels in its interpreter against torch's, and fp8 against its own definition."""

from __future__ import annotations

import pytest
import torch

from replicas.kernels.fp8 import Fp8Weights, quantise_rows
from replicas.kernels.ops import HeadShape, HeadTensors
from replicas.kernels.torch_ops import TORCH_KERNELS
from replicas.kernels.triton_ops import TritonKernels

pytest.importorskip("triton", reason="Triton's kernels need triton (part of the dev extra)")

DTYPES = [torch.float32, torch.float16]


@pytest.fixture(scope="module")
def kernels() -> TritonKernels:
    return TritonKernels()


def _rows(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype
    tolerance = 1e-6 if expected.dtype is torch.float32 else 2e-3
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 20, 96])
def test_norms_equal_torch(kernels: TritonKernels, dtype: torch.dtype, width: int) -> None:
    hidden, delta = _rows(5, width, dtype=dtype), _rows(5, width, dtype=dtype, seed=1)
    weight = _rows(width, dtype=dtype, seed=2)
    _close(kernels.rms_norm(hidden, weight, 1e-5), TORCH_KERNELS.rms_norm(hidden, weight, 1e-5))
    actual = kernels.add_rms_norm(hidden, delta, weight, 1e-5)
    expected = TORCH_KERNELS.add_rms_norm(hidden, delta, weight, 1e-5)
    assert torch.equal(actual[0], expected[0])
    _close(actual[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("head_dim", [8, 24])
def test_heads_equal_torch(
    kernels: TritonKernels, dtype: torch.dtype, normed: bool, rotated: bool, head_dim: int
) -> None:
    shape = HeadShape(num_heads=4, num_kv_heads=2, head_dim=head_dim, norm_eps=1e-6)
    fused = _rows(6, 8 * head_dim, dtype=dtype)
    angles = _rows(6, 1, head_dim, dtype=torch.float32)
    tensors = HeadTensors(
        query_norm_P=_rows(head_dim, dtype=dtype, seed=3) if normed else None,
        key_norm_P=_rows(head_dim, dtype=dtype, seed=4) if normed else None,
        cos_sin=(angles.cos().to(dtype), angles.sin().to(dtype)) if rotated else None,
    )
    expected = TORCH_KERNELS.prepare_heads(fused.clone(), shape, tensors)
    actual = kernels.prepare_heads(fused.clone(), shape, tensors)
    for one, other in zip(actual, expected, strict=True):
        _close(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [6, 1030])
def test_gate_equals_torch(kernels: TritonKernels, dtype: torch.dtype, width: int) -> None:
    gate_up = _rows(3, 2 * width, dtype=dtype) * 4
    _close(kernels.silu_mul(gate_up), TORCH_KERNELS.silu_mul(gate_up))


def test_rows_do_not_depend_on_neighbours(kernels: TritonKernels) -> None:
    hidden, weight = _rows(7, 40, dtype=torch.float32), _rows(40, dtype=torch.float32, seed=1)
    together = kernels.rms_norm(hidden, weight, 1e-5)
    for row in range(7):
        assert torch.equal(kernels.rms_norm(hidden[row : row + 1], weight, 1e-5)[0], together[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_linear_is_the_product_of_its_codes(dtype: torch.dtype) -> None:
    weights = Fp8Weights(quantise_rows)
    weight, bias = _rows(32, 48, dtype=dtype), _rows(32, dtype=dtype, seed=1)
    tensors = weights.pack("up.weight", weight)
    assert weights.holds(tensors, "up.weight")
    rows = _rows(5, 48, dtype=dtype, seed=2)
    codes, scales = quantise_rows(rows)
    widened = tensors["up.weight.fp8"].double() * tensors["up.weight.fp8_scales"].double()
    exact = codes.double() * scales.double() @ widened.T + bias.double()
    actual = weights.linear(rows, tensors, "up.weight", bias, wide=True)
    assert actual.dtype is torch.float32
    torch.testing.assert_close(actual.double(), exact, atol=1e-4, rtol=1e-4)
    # 3 bits of mantissa: each code is within 1/16 of its value.
    assert (widened - weight.double()).abs().max() <= weight.double().abs().max() / 16


def test_fp8_codes_of_a_row_span_the_range() -> None:
    rows = torch.tensor([[1e-3, -2e-3], [300.0, 100.0], [0.0, 0.0]])
    codes, scales = quantise_rows(rows)
    assert codes.float().abs().amax(dim=1).tolist() == [448, 448, 0]
    torch.testing.assert_close(codes.float() * scales, rows, rtol=1 / 16, atol=0)


def test_fp8_table_that_is_the_head_gives_its_rows_back() -> None:
    weights = Fp8Weights(quantise_rows)
    table = _rows(64, 16, dtype=torch.bfloat16)
    tensors = weights.pack("lm_head", table)
    rows = weights.embedding(torch.tensor([3, 60, 3]), tensors, "lm_head")
    assert rows.dtype is torch.bfloat16
    torch.testing.assert_close(rows, table[[3, 60, 3]], rtol=1 / 16, atol=0.02)


def test_fp8_leaves_odd_shapes_alone() -> None:
    weights = Fp8Weights(quantise_rows)
    weight = _rows(30, 48, dtype=torch.float32)
    tensors = weights.pack("up.weight", weight)
    assert tensors.keys() == {"up.weight"}
    assert not weights.holds(tensors, "up.weight")


def test_triton_quantises_rows_as_torch_does(kernels: TritonKernels) -> None:
    rows = _rows(4, 48, dtype=torch.float32) * torch.tensor([[1.0], [1e-3], [50.0], [0.0]])
    codes, scales = kernels._quantise_rows(rows)
    expected_codes, expected_scales = quantise_rows(rows)
    torch.testing.assert_close(scales, expected_scales)
    # Triton's interpreter loses the carry of a mantissa that rounds up to the next power of two;
    # a device does not.
    comparable = (expected_codes.view(torch.uint8) & 0b111) != 0
    assert comparable.sum() > 40
    assert torch.equal(codes.float()[comparable], expected_codes.float()[comparable])


def test_every_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reasons = TritonKernels.why_not(torch.float64, "cpu")
    assert any("not on cpu" in reason for reason in reasons)
    assert any("float64" in reason for reason in reasons)
    assert TritonKernels.why_not(torch.bfloat16, "cuda") == []
