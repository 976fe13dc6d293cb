"""How many bytes a unit takes in a packed store, before it is packed. Torch-free, for planning.

An upper bound: kernels pad linear weights to blocks, and how far depends on the machine. The
difference is under one percent for any layer that is worth streaming.
"""

from __future__ import annotations

import math

from offload.layout import TENSOR_ALIGN, aligned
from replicas.layers.weights import TensorSpec, WeightUnit

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_BLOCK_ROWS = 64
_BLOCK_BYTES = 64


def record_bytes(unit: WeightUnit, dtype: str) -> int:
    """Most bytes that the record of `unit` takes, in whole pages."""
    return aligned(sum(tensor_bytes(spec, dtype) for spec in unit.tensors)) or aligned(1)


def tensor_bytes(spec: TensorSpec, dtype: str) -> int:
    """Most bytes that one packed tensor takes with its alignment."""
    item = _ITEM_BYTES[dtype]
    if len(spec.shape) != 2:
        return aligned(math.prod(spec.shape) * item, TENSOR_ALIGN)
    rows, width = spec.shape
    padded = aligned(rows, _BLOCK_ROWS) * aligned(width * item, _BLOCK_BYTES)
    return aligned(padded, TENSOR_ALIGN)
