"""Bytes a model needs on each rank, from the same declarations that the loader reads.

Torch-free. Weights that two units share (tied embeddings) count once, as they are loaded once.
All ranks of a tensor-parallel group hold the same number of bytes; ranks of an expert-parallel one
need not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from cluster.base.errors import ConfigError
from replicas.kernels.fp8_layout import fits_fp8, fp8_bytes
from replicas.layers.weights import TensorSpec
from replicas.models.arch import ArchConfig
from replicas.models.weight_units import weight_units

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PINNED_SPARE = 1.25
"""Pinned host memory that rows pass through, over the most that was ever asked of it at once."""


def weight_bytes_per_rank(
    arch: ArchConfig,
    tp_size: int,
    dtype: str,
    experts: Sequence[Sequence[int]] | None = None,
    *,
    fp8: bool = False,
) -> int:
    """Bytes of one rank's resident weights in `dtype`.

    Args:
        experts: routed experts that the rank holds whole, as in `weight_units`.
        fp8: linear weights are held as codes of a byte with a scale per output feature.

    Raises:
        ConfigError: the model cannot be split so, or the dtype is unknown.
    """
    distinct: dict[object, TensorSpec] = {}
    for unit in weight_units(arch, 0, tp_size, experts):
        for spec in unit.tensors:
            distinct[spec.shape, spec.sources, spec.dtype] = spec
    return sum(_tensor_bytes(spec, dtype, fp8=fp8) for spec in distinct.values())


def _tensor_bytes(spec: TensorSpec, dtype: str, *, fp8: bool) -> int:
    if fp8 and spec.is_linear and fits_fp8(spec.shape):
        return fp8_bytes(spec.shape)
    return math.prod(spec.shape) * _item_bytes(spec.dtype or dtype)


def kv_bytes_per_token(arch: ArchConfig, tp_size: int, dtype: str) -> int:
    """Bytes of one rank's KV cache for one token: keys and values (or latents) of all layers.

    Raises:
        ConfigError: the dtype is unknown.
    """
    heads = arch.kv_heads_per_rank(tp_size)
    return arch.kv_planes * arch.num_layers * heads * arch.head_dim * _item_bytes(dtype)


def _item_bytes(dtype: str) -> int:
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"There is no dtype {dtype!r}.", f"Use one of {sorted(DTYPE_BYTES)}.")
    return DTYPE_BYTES[dtype]
