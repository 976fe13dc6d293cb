"""`ArchConfig` -> the weight units of one rank, for every family.

Torch-free: planner, loader and offload layout all start here, and so does the model itself, so
what is planned, loaded and computed cannot differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cluster.base.errors import ConfigError
from replicas.layers.shards import Shard
from replicas.layers.weights import WeightUnit
from replicas.models.arch import ArchConfig
from replicas.models.gpt2_weights import gpt2_units
from replicas.models.llama_weights import llama_units
from replicas.models.opt_weights import opt_units

_UNITS: Mapping[str, Callable[[ArchConfig, Shard], tuple[WeightUnit, ...]]] = {
    "llama": llama_units,
    "mistral": llama_units,
    "qwen2": llama_units,
    "qwen3": llama_units,
    "gpt2": gpt2_units,
    "opt": opt_units,
}


def weight_units(arch: ArchConfig, rank: int, tp_size: int) -> tuple[WeightUnit, ...]:
    """Units in the order the forward pass acquires them: embed, layer.0 ..., norm, head.

    A model without a final norm has no `norm` unit.

    Raises:
        ConfigError: unknown family, or the model cannot be split over `tp_size` ranks.
    """
    if arch.family not in _UNITS:
        raise ConfigError(
            f"Model family {arch.family!r} is not supported.", f"Use one of {sorted(_UNITS)}."
        )
    reasons = arch.why_not_tp(tp_size)
    if reasons:
        raise ConfigError(
            f"The model cannot be split over {tp_size} ranks: {'; '.join(reasons)}.",
            "Choose another tensor-parallel size.",
            param="tp",
        )
    return _UNITS[arch.family](arch, Shard(rank=rank, size=tp_size))
