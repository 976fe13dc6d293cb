"""What a model is built into: a rank's communicators, dtype, device, attention, experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cluster.base.errors import ConfigError
from cluster.dist.communicator import Communicator
from moe.block import BlockParts, MixtureBlock
from moe.layout import AllHere, ExpertLayout
from replicas.attention.backend import AttentionBackend, AttentionSpec
from replicas.attention.cpu_block import BlockSetting
from replicas.attention.cpu_paged import CpuPagedAttention
from replicas.kernels.cpu_ops import CpuKernels
from replicas.kernels.ops import HeadShape, Kernels
from replicas.kernels.torch_ops import TORCH_KERNELS
from replicas.layers.attention import SelfAttention
from replicas.layers.cpu_stack import CpuLayerStack, StackSetting
from replicas.layers.latent_attention import LatentAttention
from replicas.layers.linear import RowLinear
from replicas.layers.mixture import KernelMath, SharedExperts
from replicas.models.arch import ArchConfig

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelContext:
    """Shared by all layers of one model on one rank."""

    communicator: Communicator
    dtype: torch.dtype
    device: str
    attention_spec: AttentionSpec
    attention_backend: AttentionBackend
    kernels: Kernels = TORCH_KERNELS
    expert_layout: ExpertLayout | None = None
    """Which rank holds which experts whole; None: each rank holds a slice of all of them."""

    def attention(self, arch: ArchConfig, index: int) -> SelfAttention | LatentAttention:
        """The attention block of layer `index`."""
        if arch.latent is None:
            return self.self_attention(arch, index)
        return LatentAttention(
            arch.latent,
            self.attention_spec,
            self.attention_backend,
            RowLinear("attention_out", self.communicator, self.kernels),
            self.kernels,
        )

    def self_attention(self, arch: ArchConfig, index: int) -> SelfAttention:
        """The attention block of layer `index`, with keys and values per head."""
        layer = arch.layers[index]
        return SelfAttention(
            self.attention_spec,
            self.attention_backend,
            self.communicator,
            sliding_window=layer.sliding_window,
            scale=layer.attention_scale,
            qk_norm_eps=arch.norm_eps if arch.qk_norm else None,
            kernels=self.kernels,
        )

    def mixture(self, arch: ArchConfig, index: int) -> MixtureBlock | None:
        """The mixture of experts of layer `index`; None in a dense layer."""
        spec = arch.layers[index].moe
        if spec is None:
            return None
        shared = None
        if spec.shared_ffn_dim:
            first = self.communicator.rank == 0
            shared = SharedExperts(self.kernels, spec, arch.activation, adds_bias=first)
        layout = self.expert_layout or AllHere({index: spec.gate.num_experts})
        return MixtureBlock(
            spec,
            BlockParts(
                layer=index,
                layout=layout,
                math=KernelMath(self.kernels, spec, arch.activation),
                communicator=self.communicator,
                sliced=self.expert_layout is None,
                shared=shared,
            ),
        )

    def layer_stack(self, arch: ArchConfig) -> CpuLayerStack | None:
        """All layers of a model in one call; None where something stands between them."""
        kernels = self.kernels
        mixtures = [layer.moe for layer in arch.layers]
        in_one = (
            isinstance(kernels, CpuKernels)
            and isinstance(self.attention_backend, CpuPagedAttention)
            and self.communicator.size == 1
            and arch.latent is None
            and arch.activation == "silu"
            and self.expert_layout is None
            and len({layer.ffn_dim for layer in arch.layers if layer.moe is None}) <= 1
            and len({moe for moe in mixtures if moe is not None}) <= 1
            and all(
                layer.attention_scale in (None, self.attention_spec.scale) for layer in arch.layers
            )
        )
        if not in_one or not isinstance(kernels, CpuKernels):
            return None
        spec = self.attention_spec
        heads = HeadShape(
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            norm_eps=arch.norm_eps if arch.qk_norm else 0.0,
        )
        blocks = [
            BlockSetting(heads=heads, sliding_window=layer.sliding_window, with_bias=True)
            for layer in arch.layers
        ]
        setting = StackSetting(
            spec=spec, blocks=blocks, mixtures=mixtures, dtype=self.dtype, eps=arch.norm_eps
        )
        return CpuLayerStack(kernels.library, setting)

    def held_experts(self, arch: ArchConfig) -> Sequence[Sequence[int]] | None:
        """The experts of each layer that this rank holds whole, as `weight_units` takes them."""
        if self.expert_layout is None or not arch.has_experts:
            return None
        return [
            self.expert_layout.held(index) if layer.moe else ()
            for index, layer in enumerate(arch.layers)
        ]


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype a plan calls `name`.

    Raises:
        ConfigError: unknown name.
    """
    if name not in _DTYPES:
        raise ConfigError(f"There is no dtype {name!r}.", f"Use one of {', '.join(_DTYPES)}.")
    return _DTYPES[name]


def attention_spec(
    arch: ArchConfig, tp_size: int, dtype: str, device: str, block_size: int
) -> AttentionSpec:
    """One rank's attention shape, for a model that can be split over `tp_size` ranks."""
    return AttentionSpec(
        num_heads=arch.num_heads // tp_size,
        num_kv_heads=arch.kv_heads_per_rank(tp_size),
        head_dim=arch.head_dim,
        scale=arch.head_dim**-0.5 if arch.latent is None else arch.latent.scale,
        block_size=block_size,
        dtype=dtype,
        device=device,
        sinks=arch.attention_sinks,
        shared_plane=arch.latent is not None,
    )
