"""Codes and scales: error bounds, layouts, the compiled dequantiser against torch's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.base.env import default_cache_dir
from offload.dequant_library import DequantLibrary
from offload.precision import GROUP, Precision
from offload.quant import ROWS, CodeLayout, dequantise, quantise
from offload.quant_kernels import QuantKernels
from replicas.kernels.cpu_ops import CpuKernels
from replicas.kernels.torch_ops import TORCH_KERNELS
from tests.support.compiled_kernels import lesser_library, threads

QUANTISED = (Precision.INT8, Precision.INT4)


def noise(rows: int, width: int, seed: int = 0, scale: float = 0.05) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((rows, width), generator=generator) * scale


@given(
    rows=st.integers(1, 9),
    width=st.integers(1, 200),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e4]),
    offset=st.sampled_from([0.0, 5.0]),
    precision=st.sampled_from(QUANTISED),
)
def test_error_is_at_most_half_a_step(
    rows: int, width: int, seed: int, scale: float, offset: float, precision: Precision
) -> None:
    weight = noise(rows, width, seed, scale) + offset * scale
    back = dequantise(quantise(weight, precision, ROWS), torch.float32)
    top = 255 if precision is Precision.INT8 else 15
    for start in range(0, width, GROUP):
        group = weight[:, start : start + GROUP]
        # The range grows by what bf16 adds to the minimum and to the scale: 1/128 of each.
        span = group.amax(1) - group.amin(1) + group.amin(1).abs() / 128
        bound = span * (1 + 1 / 100) / top / 2 + 1e-6 * group.abs().amax(1) + 1e-36
        error = (back[:, start : start + GROUP] - group).abs().amax(1)
        assert (error <= bound).all()


def test_relative_error_of_gaussian_weights() -> None:
    weight = noise(512, 1024)
    for precision, bound in ((Precision.INT8, 0.0085), (Precision.INT4, 0.105)):
        back = dequantise(quantise(weight, precision, ROWS), torch.float32)
        assert (back - weight).norm() / weight.norm() < bound


@pytest.mark.parametrize("precision", QUANTISED)
def test_constant_and_zero_weights_come_back_exactly(precision: Precision) -> None:
    for value in (0.0, 1.5, -0.25):
        weight = torch.full((3, 130), value)
        assert torch.equal(dequantise(quantise(weight, precision, ROWS), torch.float32), weight)


@pytest.mark.parametrize("precision", QUANTISED)
def test_bytes_are_what_the_cost_model_counts(precision: Precision) -> None:
    for layout in (ROWS, CodeLayout(width=32, depth=2)):
        weight = quantise(noise(64, 256), precision, layout)
        stored = weight.codes.nbytes + weight.scales.nbytes
        assert stored == 64 * 256 * precision.bytes_per_weight(2)


@given(
    rows=st.integers(1, 70),
    half_width=st.integers(1, 90),
    layout=st.sampled_from(
        [CodeLayout(width=width, depth=depth) for width in (8, 16, 32) for depth in (1, 2)]
    ),
    precision=st.sampled_from(QUANTISED),
)
def test_a_layout_changes_places_and_nothing_else(
    rows: int, half_width: int, layout: CodeLayout, precision: Precision
) -> None:
    weight = noise(rows, 2 * half_width)
    plain = dequantise(quantise(weight, precision, ROWS), torch.bfloat16)
    assert torch.equal(dequantise(quantise(weight, precision, layout), torch.bfloat16), plain)


@pytest.fixture(scope="module")
def library() -> DequantLibrary:
    return DequantLibrary(default_cache_dir() / "kernels")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("precision", QUANTISED)
def test_compiled_dequantiser_makes_the_kernels_own_layout(
    library: DequantLibrary, cpu_kernels: CpuKernels, dtype: torch.dtype, precision: Precision
) -> None:
    for rows, width in ((1, 2), (33, 130), (96, 64), (70, 514)):
        weight = noise(rows, width, rows)
        layout = CodeLayout(width=cpu_kernels.library.width, depth=4 // dtype.itemsize)
        quantised = quantise(weight, precision, layout)
        out = torch.full(
            (layout.num_blocks(weight.shape), layout.num_lines(weight.shape), layout.line),
            torch.nan,
            dtype=dtype,
        )
        library.dequantise(quantised.codes, quantised.scales, out, precision, layout)
        plain = dequantise(quantised, dtype)
        assert torch.equal(cpu_kernels.library.pack(plain).flatten(), out.flatten())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("precision", QUANTISED)
@pytest.mark.parametrize("wide", [False, True])
def test_linear_equals_that_of_the_dequantised_weight(
    cpu_kernels: CpuKernels, dtype: torch.dtype, precision: Precision, wide: bool
) -> None:
    for base in (cpu_kernels, TORCH_KERNELS):
        kernels = QuantKernels(base, precision, default_cache_dir() / "kernels")
        weight = noise(150, 130).to(dtype)
        tensors = kernels.quantise("up.weight", weight)
        quantised = quantise(weight, precision, kernels.layout(dtype))
        plain = base.pack("up.weight", dequantise(quantised, dtype))
        bias = noise(1, 150, 1)[0].to(dtype)
        for rows in (1, 7, 40, 67):
            x = noise(rows, 130, 2, 1.0).to(dtype)
            ours = kernels.linear(x, tensors, "up.weight", bias, wide=wide)
            assert torch.equal(ours, base.linear(x, plain, "up.weight", bias, wide=wide))


@pytest.mark.parametrize("precision", QUANTISED)
@pytest.mark.parametrize("rows", [3, 300])
def test_panels_of_a_large_weight_on_two_threads(
    cpu_kernels: CpuKernels, precision: Precision, rows: int
) -> None:
    kernels = QuantKernels(cpu_kernels, precision, default_cache_dir() / "kernels")
    weight = noise(1000, 1024).bfloat16()
    quantised = quantise(weight, precision, kernels.layout(torch.bfloat16))
    plain = cpu_kernels.pack("up.weight", dequantise(quantised, torch.bfloat16))
    x = noise(rows, 1024, 2, 1.0).bfloat16()
    with threads(2):
        ours = kernels.linear(x, kernels.quantise("up.weight", weight), "up.weight")
        assert torch.equal(ours, cpu_kernels.linear(x, plain, "up.weight"))


@pytest.mark.parametrize("precision", QUANTISED)
@pytest.mark.parametrize("scale", [1e-41, 1e-38, 1e-36, 1e-28, 1e30])
def test_numbers_at_the_ends_of_bf16_are_rounded_alike(
    library: DequantLibrary, cpu_kernels: CpuKernels, precision: Precision, scale: float
) -> None:
    """The processor's own conversion takes subnormal numbers for zero; torch does not."""
    layout = CodeLayout(width=cpu_kernels.library.width, depth=2)
    quantised = quantise(noise(32, 128, 3, scale), precision, layout)
    out = torch.empty((32 // layout.width, 64, layout.line), dtype=torch.bfloat16)
    library.dequantise(quantised.codes, quantised.scales, out, precision, layout)
    plain = layout.arrange(dequantise(quantised, torch.bfloat16))
    assert torch.equal(out.view(torch.int16), plain.view(torch.int16))


@pytest.mark.parametrize("rows", [1, 40])
def test_products_without_matrix_tiles(rows: int) -> None:
    """On a processor that has tiles: with kernels that were built without."""
    base = CpuKernels(lesser_library())
    kernels = QuantKernels(base, Precision.INT4, default_cache_dir() / "kernels")
    weight = noise(70, 130).bfloat16()
    quantised = quantise(weight, Precision.INT4, kernels.layout(torch.bfloat16))
    plain = base.pack("up.weight", dequantise(quantised, torch.bfloat16))
    x = noise(rows, 130, 2, 1.0).bfloat16()
    ours = kernels.linear(x, kernels.quantise("up.weight", weight), "up.weight")
    assert torch.equal(ours, base.linear(x, plain, "up.weight"))


def test_a_width_that_the_layout_cannot_hold_stays_native(cpu_kernels: CpuKernels) -> None:
    kernels = QuantKernels(cpu_kernels, Precision.INT8, default_cache_dir() / "kernels")
    tensors = kernels.quantise("up.weight", noise(4, 33).bfloat16())
    assert set(tensors) == set(cpu_kernels.pack("up.weight", noise(4, 33).bfloat16()))
