"""A layer's attention in one call against the separate calls: the same bits, whatever the batch."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from cluster.dist.communicator import SingleRank
from replicas.attention.backend import AttentionMetadata, AttentionSpec
from replicas.attention.cpu_paged import CpuPagedAttention
from replicas.kernels.cpu_ops import CpuKernels
from replicas.layers.attention import SelfAttention, StepContext
from tests.support.stepping import metadata_for

WIDTH, HEADS, KV_HEADS = 80, 6, 2
REQUESTS = ((1, 97), (70, 60), (1, 3), (11, 0), (1, 64))
"""(query tokens, tokens before them) of each request."""


class OneLayer:
    """A layer's weights, its cache with older tokens, and one step's tokens."""

    def __init__(self, kernels: CpuKernels, dtype: torch.dtype, dim: int, block: int) -> None:
        self.kernels, self.dtype, self.block_size = kernels, dtype, block
        self.generator = torch.Generator().manual_seed(dim + block)
        self.spec = AttentionSpec(
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=dim,
            scale=dim**-0.5,
            block_size=block,
            dtype=str(dtype).removeprefix("torch."),
            device="cpu",
        )
        fused = (HEADS + 2 * KV_HEADS) * dim
        self.tensors = kernels.pack("qkv.weight", self.noise(fused, WIDTH))
        self.tensors |= kernels.pack("attention_out.weight", self.noise(WIDTH, HEADS * dim))
        self.tensors |= {"qkv.bias": self.noise(fused), "attention_out.bias": self.noise(WIDTH)}
        self.tensors |= {f"{name}_norm.weight": self.noise(dim) for name in "qk"}
        blocks = iter(torch.randperm(60, generator=self.generator).tolist())
        lengths = [sum(request) for request in REQUESTS]
        self.tables = [[next(blocks) for _ in range(-(-size // block))] for size in lengths]
        self.cache = self.noise(2, 60, block, KV_HEADS, dim)
        self.hidden = self.noise(sum(count for count, _ in REQUESTS), WIDTH)
        self.angles = self.noise(len(self.hidden), 1, dim), self.noise(len(self.hidden), 1, dim)

    def noise(self, *shape: int) -> torch.Tensor:
        return (0.3 * torch.randn(shape, generator=self.generator)).to(self.dtype)

    def attention(self, window: int | None, with_norms: bool) -> SelfAttention:
        if not with_norms:
            self.tensors = {k: v for k, v in self.tensors.items() if "_norm" not in k}
        return SelfAttention(
            self.spec,
            CpuPagedAttention(self.spec, self.kernels.library),
            SingleRank(),
            sliding_window=window,
            qk_norm_eps=1e-6 if with_norms else None,
            kernels=self.kernels,
        )

    def metadata(self) -> AttentionMetadata:
        counts = [count for count, _ in REQUESTS]
        lengths = [sum(request) for request in REQUESTS]
        return metadata_for(counts, lengths, self.tables, self.block_size)


def run(
    attention: SelfAttention, layer: OneLayer, tensors: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    cache = layer.cache.clone()
    context = StepContext(attention=layer.metadata(), cos_sin=layer.angles)
    return attention.forward(layer.hidden.clone(), context, tensors, cache), cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "block"), [(32, 16), (64, 32), (24, 16), (32, 8)])
@pytest.mark.parametrize(("window", "with_norms"), [(None, True), (50, False)])
def test_one_call_is_the_separate_ones(
    cpu_kernels: CpuKernels,
    dtype: torch.dtype,
    dim: int,
    block: int,
    window: int | None,
    with_norms: bool,
) -> None:
    layer = OneLayer(cpu_kernels, dtype, dim, block)
    attention = layer.attention(window, with_norms)
    assert attention._block is not None
    together, cache = run(attention, layer, layer.tensors)
    torch.set_num_threads(3)
    assert torch.equal(run(attention, layer, layer.tensors)[0], together)
    torch.set_num_threads(1)
    attention._block = None
    separate, separate_cache = run(attention, layer, layer.tensors)
    assert torch.equal(together, separate)
    assert torch.equal(cache, separate_cache)


def test_rows_alone_are_rows_together(cpu_kernels: CpuKernels) -> None:
    layer = OneLayer(cpu_kernels, torch.bfloat16, 32, 16)
    attention = layer.attention(None, True)
    together, cache = run(attention, layer, layer.tensors)
    row = 0
    for index, (count, before) in enumerate(REQUESTS):
        for offset in range(count):
            only = slice(row, row + 1)
            metadata = metadata_for([1], [before + offset + 1], [layer.tables[index]], 16)
            context = StepContext(
                attention=metadata, cos_sin=(layer.angles[0][only], layer.angles[1][only])
            )
            alone = attention.forward(layer.hidden[only], context, layer.tensors, cache)
            assert torch.equal(alone, together[only]), row
            row += 1


def test_other_weights_are_looked_up_again(cpu_kernels: CpuKernels) -> None:
    """A streaming provider hands out another mapping, or plain weights, at every step."""
    layer = OneLayer(cpu_kernels, torch.bfloat16, 32, 16)
    attention = layer.attention(None, False)
    first, _ = run(attention, layer, layer.tensors)
    bias = {"attention_out.bias": layer.tensors["attention_out.bias"] + 1}
    moved, _ = run(attention, layer, layer.tensors | bias)
    assert not torch.equal(first, moved)
    assert torch.equal(run(attention, layer, dict(layer.tensors))[0], first)
    fused = (HEADS + 2 * KV_HEADS) * 32
    plain = {
        "qkv.weight": layer.noise(fused, WIDTH),
        "qkv.bias": layer.tensors["qkv.bias"],
        "attention_out.weight": layer.noise(WIDTH, HEADS * 32),
    }
    assert attention._block is not None
    assert (
        attention._block.forward(
            layer.hidden, layer.angles, plain, layer.cache.clone(), layer.metadata()
        )
        is None
    )
    assert run(attention, layer, plain)[0].shape == first.shape
