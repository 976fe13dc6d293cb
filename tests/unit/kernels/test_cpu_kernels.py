"""Compiled kernels against torch's, and a row's bits against everything that must not touch it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.base.errors import InternalError
from replicas.kernels.cpu_ops import CpuKernels
from replicas.kernels.ops import HeadShape, HeadTensors, MlpNames
from replicas.kernels.torch_ops import TORCH_KERNELS, silu_mlp_in_steps
from tests.support.compiled_kernels import LEVELS, lesser_library, threads

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2}
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def noise(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(ours: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    """Within a rounding of the exact answer, measured against the size of the whole."""
    assert ours.shape == exact.shape
    scale = exact.abs().max().item() or 1.0
    torch.testing.assert_close(ours.float(), exact, atol=TOLERANCE[dtype] * scale, rtol=0)


def exact_linear(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    wide = hidden.double() @ weight.double().t()
    return (wide if bias is None else wide + bias.double()).float()


@settings(max_examples=120)
@given(
    rows=st.one_of(st.integers(1, 13), st.sampled_from([31, 64, 97, 200])),
    out_features=st.integers(1, 200),
    in_features=st.one_of(st.integers(1, 70), st.sampled_from([1024, 1027, 2100])),
    with_bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
)
def test_linear(
    cpu_kernels: CpuKernels,
    rows: int,
    out_features: int,
    in_features: int,
    with_bias: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    hidden = noise(rows, in_features, dtype=dtype, seed=seed)
    weight = noise(out_features, in_features, dtype=dtype, seed=seed + 1)
    bias = noise(out_features, dtype=dtype, seed=seed + 2) if with_bias else None
    tensors = cpu_kernels.pack("w", weight)
    assert tensors["w"].shape == weight.shape
    ours = cpu_kernels.linear(hidden, tensors, "w", bias)
    assert ours.dtype == dtype
    exact = exact_linear(hidden, weight, bias)
    assert_near(ours, exact, dtype)
    wide = cpu_kernels.linear(hidden, tensors, "w", bias, wide=True)
    assert wide.dtype == torch.float32
    assert_near(wide, exact, torch.float32)
    assert torch.equal(wide.to(dtype), ours)


@each_dtype
def test_a_linear_row_is_the_same_in_every_batch(
    cpu_kernels: CpuKernels, dtype: torch.dtype
) -> None:
    hidden = noise(200, 1100, dtype=dtype)
    tensors = cpu_kernels.pack("w", noise(150, 1100, dtype=dtype, seed=1))
    whole = cpu_kernels.linear(hidden, tensors, "w", wide=True)
    with threads(2):
        assert torch.equal(cpu_kernels.linear(hidden, tensors, "w", wide=True), whole)
    for size in range(1, 65):
        with threads(1 + size % 3):
            part = cpu_kernels.linear(hidden[:size], tensors, "w", wide=True)
        assert torch.equal(part, whole[:size]), size
    for start in (1, 63, 130, 199):
        alone = cpu_kernels.linear(hidden[start : start + 1], tensors, "w", wide=True)
        assert torch.equal(alone, whole[start : start + 1])


@pytest.mark.parametrize("in_features", [31, 64, 129])
@pytest.mark.parametrize("scale", [1e-19, 1e-22, 1e-38, 1e-40])
def test_a_row_of_tiny_numbers_is_the_same_in_every_batch(
    cpu_kernels: CpuKernels, in_features: int, scale: float
) -> None:
    """Few rows and many take different instructions, which must agree on what is too small."""
    hidden = (noise(40, in_features, dtype=torch.float32) * scale).to(torch.bfloat16)
    weight = (noise(50, in_features, dtype=torch.float32, seed=1) * min(1.0, 1e19 * scale)).to(
        torch.bfloat16
    )
    tensors = cpu_kernels.pack("w", weight)
    whole = cpu_kernels.linear(hidden, tensors, "w", wide=True)
    for size in range(1, 18):
        part = cpu_kernels.linear(hidden[:size], tensors, "w", wide=True)
        assert torch.equal(part.view(torch.int32), whole[:size].view(torch.int32)), size


@each_dtype
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_linear_spreads_the_not_finite_like_torch(
    cpu_kernels: CpuKernels, dtype: torch.dtype, poison: float
) -> None:
    hidden, weight = noise(7, 65, dtype=dtype), noise(70, 65, dtype=dtype, seed=1)
    hidden[2, 64] = poison
    weight[5, 1] = poison
    ours = cpu_kernels.linear(hidden, cpu_kernels.pack("w", weight), "w")
    theirs = TORCH_KERNELS.linear(hidden, {"w": weight}, "w")
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.isposinf(), theirs.isposinf())
    assert torch.equal(ours.isneginf(), theirs.isneginf())


@each_dtype
@pytest.mark.parametrize("shape", [(5, 3), (131, 64), (200, 33)])
def test_packed_table_gives_back_its_rows(
    cpu_kernels: CpuKernels, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    table = noise(*shape, dtype=dtype)
    ids = torch.arange(shape[0]).flip(0)
    packed = cpu_kernels.pack("tokens", table)
    assert torch.equal(cpu_kernels.embedding(ids, packed, "tokens"), table[ids])
    assert torch.equal(cpu_kernels.embedding(ids, {"tokens": table}, "tokens"), table[ids])
    for wrong in (-1, shape[0]):
        with pytest.raises(InternalError, match="token id"):
            cpu_kernels.embedding(torch.tensor([0, wrong]), packed, "tokens")


@settings(max_examples=60)
@given(
    rows=st.integers(1, 40),
    dim=st.one_of(st.integers(1, 70), st.sampled_from([768, 2048])),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
)
def test_norms_and_gate(
    cpu_kernels: CpuKernels, rows: int, dim: int, dtype: torch.dtype, seed: int
) -> None:
    hidden = noise(rows, dim, dtype=dtype, seed=seed)
    delta = noise(rows, dim, dtype=dtype, seed=seed + 1)
    weight = noise(dim, dtype=dtype, seed=seed + 2)
    expected = TORCH_KERNELS.rms_norm(hidden, weight, 1e-6)
    # Another order of the sum may move the scale by an ulp: one rounding of the result apart.
    near = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(cpu_kernels.rms_norm(hidden, weight, 1e-6), expected, **near)
    total, normed = cpu_kernels.add_rms_norm(hidden, delta, weight, 1e-6)
    assert torch.equal(total, hidden + delta)
    torch.testing.assert_close(normed, TORCH_KERNELS.rms_norm(total, weight, 1e-6), **near)
    gate_up = 4 * noise(rows, 2 * dim, dtype=dtype, seed=seed + 3)
    ours = cpu_kernels.silu_mul(gate_up)
    torch.testing.assert_close(ours, TORCH_KERNELS.silu_mul(gate_up), **near)
    assert torch.equal(cpu_kernels.silu_mul(gate_up[-1:]), ours[-1:])


@each_dtype
def test_gate_at_its_ends(cpu_kernels: CpuKernels, dtype: torch.dtype) -> None:
    values = [0.0, -0.0, 100.0, -100.0, 1e30, -1e30, float("inf"), float("nan"), 89.0, -88.5]
    gate = torch.tensor([values * 4], dtype=dtype)
    both = torch.cat((gate, torch.ones_like(gate)), dim=1)
    torch.testing.assert_close(
        cpu_kernels.silu_mul(both),
        TORCH_KERNELS.silu_mul(both),
        equal_nan=True,
        atol=1e-6,
        rtol=1e-2,
    )


@each_dtype
@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize("head_dim", [2, 8, 64, 72])
def test_heads(
    cpu_kernels: CpuKernels, dtype: torch.dtype, with_norms: bool, head_dim: int
) -> None:
    shape = HeadShape(num_heads=6, num_kv_heads=2, head_dim=head_dim, norm_eps=1e-6)
    fused = noise(11, 10 * head_dim, dtype=dtype)
    angle = noise(11, 1, head_dim, dtype=torch.float32, seed=1)
    tensors = HeadTensors(
        query_norm_P=noise(head_dim, dtype=dtype, seed=2) if with_norms else None,
        key_norm_P=noise(head_dim, dtype=dtype, seed=3) if with_norms else None,
        cos_sin=(angle.cos().to(dtype), angle.sin().to(dtype)),
    )
    expected = TORCH_KERNELS.prepare_heads(fused, shape, tensors)
    ours = cpu_kernels.prepare_heads(fused.clone(), shape, tensors)
    for mine, theirs in zip(ours, expected, strict=True):
        near = {"atol": 2 * TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
        torch.testing.assert_close(mine, theirs, **near)
    assert torch.equal(ours[2], expected[2])


MLP = MlpNames(up="up", up_bias="up_bias", down="down", down_bias="down_bias")


@each_dtype
@pytest.mark.parametrize(("dim", "ffn"), [(64, 96), (50, 70), (96, 33)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_mlp_in_one_call_is_the_steps(
    cpu_kernels: CpuKernels, dtype: torch.dtype, dim: int, ffn: int, with_bias: bool
) -> None:
    hidden = noise(150, dim, dtype=dtype)
    tensors = cpu_kernels.pack("up", noise(2 * ffn, dim, dtype=dtype, seed=1))
    tensors |= cpu_kernels.pack("down", noise(dim, ffn, dtype=dtype, seed=2))
    if with_bias:
        tensors |= {"up_bias": noise(2 * ffn, dtype=dtype, seed=3)}
        tensors |= {"down_bias": noise(dim, dtype=dtype, seed=4)}
    for size in (1, 2, 15, 16, 17, 33, 64, 65, 150):
        for count in (1, 2, 3):
            with threads(count):
                whole = cpu_kernels.silu_mlp(hidden[:size], tensors, MLP)
                steps = silu_mlp_in_steps(cpu_kernels, hidden[:size], tensors, MLP)
            assert torch.equal(whole, steps), (size, count)
    first = cpu_kernels.silu_mlp(hidden[:1], tensors, MLP)
    assert torch.equal(cpu_kernels.silu_mlp(hidden, tensors, MLP)[:1], first)
    no_bias = MlpNames(up="up", up_bias="up_bias", down="down", down_bias=None)
    part = cpu_kernels.silu_mlp(hidden, tensors, no_bias)
    assert torch.equal(part, silu_mlp_in_steps(cpu_kernels, hidden, tensors, no_bias))


def test_mlp_refuses_weights_that_do_not_fit(cpu_kernels: CpuKernels) -> None:
    tensors = cpu_kernels.pack("up", torch.ones(12, 4)) | cpu_kernels.pack("down", torch.ones(4, 5))
    with pytest.raises(InternalError, match="do not fit 4 inputs"):
        cpu_kernels.silu_mlp(torch.ones(1, 4), tensors, MLP)


@pytest.mark.parametrize("shape", [(3, 1), (40, 31), (70, 64), (129, 100), (33, 2100)])
def test_without_matrix_tiles(cpu_kernels: CpuKernels, shape: tuple[int, int]) -> None:
    """The other bf16 path of the same machine: as near to the exact answer, rows as independent."""
    other = CpuKernels(lesser_library())
    assert other.library.isa != "amx_bf16"
    hidden = noise(37, shape[1], dtype=torch.bfloat16)
    weight = noise(*shape, dtype=torch.bfloat16, seed=1)
    for kernels in (other, cpu_kernels):
        tensors = kernels.pack("w", weight)
        ours = kernels.linear(hidden, tensors, "w", wide=True)
        assert_near(ours, exact_linear(hidden, weight, None), torch.float32)
        for row in (0, 17, 36):
            alone = kernels.linear(hidden[row : row + 1], tensors, "w", wide=True)
            assert torch.equal(alone, ours[row : row + 1])


@pytest.mark.parametrize("march", LEVELS)
@each_dtype
def test_other_instruction_sets(cpu_kernels: CpuKernels, march: str, dtype: torch.dtype) -> None:
    other = CpuKernels(lesser_library(march))
    assert other.library.isa != "avx512_bf16"
    hidden, weight = noise(13, 131, dtype=dtype), noise(77, 131, dtype=dtype, seed=1)
    tensors = other.pack("w", weight)
    ours = other.linear(hidden, tensors, "w")
    assert_near(ours, exact_linear(hidden, weight, None), dtype)
    for row in range(13):
        assert torch.equal(other.linear(hidden[row : row + 1], tensors, "w"), ours[row : row + 1])
    gated = other.silu_mul(noise(3, 90, dtype=dtype))
    torch.testing.assert_close(gated, cpu_kernels.silu_mul(noise(3, 90, dtype=dtype)))


def test_wrong_tensors_are_refused(cpu_kernels: CpuKernels) -> None:
    tensors = cpu_kernels.pack("w", torch.ones(4, 6))
    with pytest.raises(InternalError, match="does not fit 7 inputs"):
        cpu_kernels.linear(torch.ones(2, 7), tensors, "w")
    with pytest.raises(InternalError, match="float16"):
        cpu_kernels.silu_mul(torch.ones(2, 6, dtype=torch.float16))
    with pytest.raises(InternalError, match="packed for other kernels"):
        TORCH_KERNELS.linear(torch.ones(2, 6), tensors, "w")


@each_dtype
def test_no_rows_are_no_work(cpu_kernels: CpuKernels, dtype: torch.dtype) -> None:
    """A rank without tokens still calls its layers."""
    tensors = {
        **cpu_kernels.pack("up", noise(128, 64, dtype=dtype)),
        **cpu_kernels.pack("down", noise(64, 64, dtype=dtype)),
    }
    nothing = torch.empty((0, 64), dtype=dtype)
    assert cpu_kernels.linear(nothing, tensors, "up").shape == (0, 128)
    assert cpu_kernels.linear(nothing, tensors, "up", wide=True).dtype is torch.float32
    assert cpu_kernels.silu_mlp(nothing, tensors, MLP).shape == (0, 64)
