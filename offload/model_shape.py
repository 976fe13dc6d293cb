"""What the cost model needs to know of a model: bytes and multiplications, unit by unit.

Torch-free, for one tensor-parallel rank, made from the same declarations that the loader and the
packer read. Layers are what streams; embedding, norm and head (the fixed units) are used by a few
rows of each step and stream only where the device cannot hold them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from offload.precision import Precision
from replicas.layers.weights import TensorSpec, WeightUnit
from replicas.models.arch import ArchConfig
from replicas.models.memory import DTYPE_BYTES, kv_bytes_per_token
from replicas.models.weight_units import weight_units


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """One decoder layer on one rank."""

    linear_weights: int
    """Weights that are multiplied and can be quantised."""
    other_bytes: int
    """Norms and biases, never quantised."""
    native_bytes_per_weight: int

    def record_bytes(self, precision: Precision) -> int:
        """Bytes of the layer in a store of this format, without alignment."""
        each = precision.bytes_per_weight(self.native_bytes_per_weight)
        return math.ceil(self.linear_weights * each) + self.other_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """One rank's share of a model."""

    layers: tuple[LayerShape, ...]
    fixed_units: tuple[tuple[str, int], ...]
    """Name and bytes of embedding, norm and head, each with everything it needs."""
    fixed_bytes: int
    """What they take together on the device; what two of them share counts once."""
    head_weights: int
    """Multiplied once for each row that is sampled."""
    kv_bytes_per_token: int
    attention_flops_per_pair: int
    """Operations of all layers for one query token and one key."""

    @property
    def layer_weights(self) -> int:
        """Linear weights of all layers."""
        return sum(layer.linear_weights for layer in self.layers)

    def layer_bytes(self, precision: Precision) -> int:
        """Bytes of all layers in a store of this format."""
        return sum(layer.record_bytes(precision) for layer in self.layers)

    @property
    def fixed_read_bytes(self) -> int:
        """What a step reads of the fixed units when they stream: shared bytes twice."""
        return sum(num_bytes for _, num_bytes in self.fixed_units)


def model_shape(arch: ArchConfig, tp_size: int, dtype: str) -> ModelShape:
    """The shape of one rank in `dtype`.

    Raises:
        ConfigError: the model cannot be split so, or the dtype is unknown.
    """
    item = DTYPE_BYTES[dtype]
    units = weight_units(arch, 0, tp_size)
    fixed = [unit for unit in units if not unit.name.startswith("layer.")]
    layers = [
        _layer([unit for unit in units if _layer_index(unit) == index], item)
        for index in range(arch.num_layers)
    ]
    heads = arch.num_heads // tp_size
    return ModelShape(
        layers=tuple(layers),
        fixed_units=tuple((unit.name, _distinct_elements(unit.tensors) * item) for unit in fixed),
        fixed_bytes=_distinct_elements(spec for unit in fixed for spec in unit.tensors) * item,
        head_weights=sum(
            math.prod(spec.shape) for unit in fixed if unit.name == "head" for spec in unit.tensors
        ),
        kv_bytes_per_token=kv_bytes_per_token(arch, tp_size, dtype),
        attention_flops_per_pair=4 * heads * arch.head_dim * arch.num_layers,
    )


def _layer_index(unit: WeightUnit) -> int | None:
    """Layer of a unit (`layer.3`, and what belongs to it), None for the others."""
    kind, _, rest = unit.name.partition(".")
    return int(rest.partition(".")[0]) if kind == "layer" else None


def _layer(units: Iterable[WeightUnit], item: int) -> LayerShape:
    specs = [spec for unit in units for spec in unit.tensors]
    linear = sum(math.prod(spec.shape) for spec in specs if spec.is_linear)
    everything = sum(math.prod(spec.shape) for spec in specs)
    return LayerShape(
        linear_weights=linear,
        other_bytes=(everything - linear) * item,
        native_bytes_per_weight=item,
    )


def _distinct_elements(specs: Iterable[TensorSpec]) -> int:
    distinct = {(spec.shape, spec.sources): math.prod(spec.shape) for spec in specs}
    return sum(distinct.values())
