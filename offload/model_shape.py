"""What the cost model needs to know of a model: bytes and multiplications, unit by unit.

Torch-free, for one tensor-parallel rank, made from the same declarations that the loader and the
packer read. Layers are what streams; embedding, norm and head (the fixed units) are used by a few
rows of each step and stream only where the device cannot hold them. Record sizes are the packer's
upper bounds, so that what is planned here holds when the store is opened.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from offload.expert_division import row_bytes
from offload.layout import TENSOR_ALIGN, aligned
from offload.precision import GROUP, GROUP_BYTES, NEVER_QUANTISED, Precision
from offload.record_sizes import record_bytes, tensor_bytes
from replicas.layers.weights import TensorSpec, WeightUnit
from replicas.models.arch import ArchConfig, LayerSpec
from replicas.models.memory import DTYPE_BYTES, kv_bytes_per_token
from replicas.models.weight_units import weight_units

_BLOCK_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitShape:
    """One weight unit: its record in each format, and what it multiplies."""

    name: str
    linear_weights: int
    """Weights that are multiplied and can be quantised."""
    native_bytes: int
    int8_bytes: int
    int4_bytes: int

    def record_bytes(self, precision: Precision) -> int:
        """Bytes of the record in a store of this format."""
        match precision:
            case Precision.NATIVE:
                return self.native_bytes
            case Precision.INT8:
                return self.int8_bytes
            case Precision.INT4:
                return self.int4_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """One decoder layer on one rank: a unit, and one more for each routed expert."""

    base: UnitShape
    experts: tuple[UnitShape, ...] = ()
    top_k: int = 0
    """Experts that a token visits."""
    routed: tuple[str, ...] = ()
    """Names of all routed experts, where this rank holds a part of them and others the rest."""

    @property
    def units(self) -> tuple[UnitShape, ...]:
        """All of them."""
        return (self.base, *self.experts)

    @property
    def linear_weights(self) -> int:
        """Of all units."""
        return sum(unit.linear_weights for unit in self.units)

    def record_bytes(self, precision: Precision) -> int:
        """Bytes of all records."""
        return self.base.record_bytes(precision) + self.expert_bytes(precision)

    def expert_bytes(self, precision: Precision) -> int:
        """Bytes of the routed experts' records."""
        return len(self.experts) * self.largest_expert_bytes(precision)

    def largest_expert_bytes(self, precision: Precision) -> int:
        """Bytes of one routed expert's record, the same for all of a layer; 0 without any."""
        return self.experts[0].record_bytes(precision) if self.experts else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """One rank's share of a model."""

    layers: tuple[LayerShape, ...]
    fixed_units: tuple[UnitShape, ...]
    """Embedding, norm and head, always native; what two of them share is in both."""
    fixed_bytes: int
    """What they take together on the device; what two of them share counts once."""
    kv_bytes_per_token: int
    attention_flops_per_pair: int
    """Operations of all layers for one query token and one key."""
    row_values: int = 0
    """Values of one token that the layers work on beside their products (`layer_values`)."""
    expert_row_bytes: int = 0
    """That travel for a row whose expert the host computes, there and back."""
    logits: int = 0
    """Values of one row that sampling looks at."""
    stored_share: float = 1.0
    """Bytes of a lossless record against those of its image."""

    @property
    def head_weights(self) -> int:
        """Multiplied once for each row that is sampled."""
        return sum(unit.linear_weights for unit in self.fixed_units if unit.name == "head")

    @property
    def fixed_read_bytes(self) -> int:
        """What a step reads of the fixed units when they stream: shared bytes twice."""
        return sum(unit.native_bytes for unit in self.fixed_units)

    def layer_bytes(self, precision: Precision) -> int:
        """Bytes of all layers in a store of this format."""
        return sum(layer.record_bytes(precision) for layer in self.layers)


def model_shape(arch: ArchConfig, tp_size: int, dtype: str) -> ModelShape:
    """The shape of one rank in `dtype`.

    Raises:
        ConfigError: the model cannot be split so, or the dtype is unknown.
    """
    units = weight_units(arch, 0, tp_size)
    fixed = [unit for unit in units if _layer_of(unit) is None]
    heads = arch.num_heads // tp_size
    return ModelShape(
        layers=tuple(
            _layer(arch, index, [unit for unit in units if _layer_of(unit) == index], dtype)
            for index in range(arch.num_layers)
        ),
        fixed_units=tuple(_unit(unit, dtype) for unit in fixed),
        fixed_bytes=sum(_distinct_records(fixed, dtype)),
        kv_bytes_per_token=kv_bytes_per_token(arch, tp_size, dtype),
        attention_flops_per_pair=4 * heads * arch.head_dim * arch.num_layers,
        row_values=sum(
            layer_values(
                arch.model_dim,
                _inner_width(layer, tp_size),
                query_width=heads * arch.head_dim,
                kv_width=arch.kv_heads_per_rank(tp_size) * arch.head_dim,
            )
            for layer in arch.layers
        ),
        expert_row_bytes=row_bytes(arch.model_dim, DTYPE_BYTES[dtype]),
        logits=arch.vocab_size,
    )


def layer_values(model_dim: int, ffn_dim: int, *, query_width: int, kv_width: int) -> int:
    """Values of one token that one layer reads and writes beside its products.

    Two norms and two sums, heads that are turned and attended with, an activation over two halves.
    """
    return 8 * model_dim + 4 * query_width + 4 * kv_width + 3 * ffn_dim


def _inner_width(layer: LayerSpec, tp_size: int) -> int:
    """Values between the two products of a layer's MLP, of all that a token visits."""
    if layer.moe is None:
        return layer.ffn_dim // tp_size
    return (layer.moe.gate.top_k * layer.moe.ffn_dim + layer.moe.shared_ffn_dim) // tp_size


def _layer_of(unit: WeightUnit) -> int | None:
    """Layer of a unit (`layer.3`, `layer.3.expert.7`), None for the others."""
    kind, _, rest = unit.name.partition(".")
    return int(rest.partition(".")[0]) if kind == "layer" else None


def _layer(arch: ArchConfig, index: int, units: Sequence[WeightUnit], dtype: str) -> LayerShape:
    base, *experts = units
    moe = arch.layers[index].moe
    return LayerShape(
        base=_unit(base, dtype),
        experts=tuple(_unit(expert, dtype) for expert in experts),
        top_k=0 if moe is None else moe.gate.top_k,
    )


def _unit(unit: WeightUnit, dtype: str) -> UnitShape:
    return UnitShape(
        name=unit.name,
        linear_weights=sum(math.prod(spec.shape) for spec in unit.tensors if spec.is_linear),
        native_bytes=record_bytes(unit, dtype),
        int8_bytes=_quantised_bytes(unit, dtype, Precision.INT8),
        int4_bytes=_quantised_bytes(unit, dtype, Precision.INT4),
    )


def _quantised_bytes(unit: WeightUnit, dtype: str, precision: Precision) -> int:
    """Most bytes of the unit's record with its linear weights as codes and scales."""
    total = 0
    for spec in unit.tensors:
        if not spec.is_linear or spec.name in NEVER_QUANTISED:
            total += tensor_bytes(spec, dtype)
            continue
        rows, width = aligned(spec.shape[0], _BLOCK_ROWS), aligned(spec.shape[1], GROUP)
        codes = rows * width if precision is Precision.INT8 else rows * width // 2
        total += aligned(codes, TENSOR_ALIGN) + rows * width // GROUP * GROUP_BYTES
    return aligned(total)


def _distinct_records(units: Sequence[WeightUnit], dtype: str) -> list[int]:
    """Bytes of every record: a unit with the tensors of an earlier one shares its record."""
    sizes: list[int] = []
    seen: list[set[object]] = []
    for unit in units:
        tensors = {_identity(spec) for spec in unit.tensors}
        if tensors and any(tensors <= others for others in seen):
            continue
        seen.append(tensors)
        sizes.append(record_bytes(unit, dtype))
    return sizes


def _identity(spec: TensorSpec) -> object:
    return spec.shape, spec.sources
