"""What a model is built into: one rank's communicator, dtype, device and attention backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cluster.base.errors import ConfigError
from cluster.dist.communicator import Communicator
from replicas.attention.backend import AttentionBackend, AttentionSpec
from replicas.kernels.ops import Kernels
from replicas.kernels.torch_ops import TORCH_KERNELS
from replicas.layers.attention import SelfAttention
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

    def self_attention(self, arch: ArchConfig, index: int) -> SelfAttention:
        """The attention block of layer `index`."""
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
    """One rank's attention shape.

    Raises:
        ConfigError: the model cannot be split over `tp_size` ranks.
    """
    reasons = arch.why_not_tp(tp_size)
    if reasons:
        raise ConfigError(
            f"The model cannot be split over {tp_size} ranks: {'; '.join(reasons)}.",
            "Choose another tensor-parallel size.",
            param="tp",
        )
    return AttentionSpec(
        num_heads=arch.num_heads // tp_size,
        num_kv_heads=arch.kv_heads_per_rank(tp_size),
        head_dim=arch.head_dim,
        scale=arch.head_dim**-0.5,
        block_size=block_size,
        dtype=dtype,
        device=device,
    )
