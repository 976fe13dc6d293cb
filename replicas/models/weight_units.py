"""`ArchConfig` -> the weight units of one rank, for every family.

Torch-free: planner, loader and offload layout all start here, and so does the model itself, so
what is planned, loaded and computed cannot differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from cluster.base.errors import ConfigError
from replicas.layers.shards import Shard
from replicas.layers.weights import WeightUnit
from replicas.models.arch import ArchConfig
from replicas.models.gpt2_weights import gpt2_units
from replicas.models.llama_weights import llama_units
from replicas.models.mixture_weights import add_experts
from replicas.models.opt_weights import opt_units

_UNITS: Mapping[str, Callable[[ArchConfig, Shard], tuple[WeightUnit, ...]]] = {
    "llama": llama_units,
    "mistral": llama_units,
    "qwen2": llama_units,
    "qwen3": llama_units,
    "mixtral": llama_units,
    "qwen2_moe": llama_units,
    "qwen3_moe": llama_units,
    "gpt_oss": llama_units,
    "deepseek_v2": llama_units,
    "deepseek_v3": llama_units,
    "gpt2": gpt2_units,
    "deepspeed_moe": gpt2_units,
    "opt": opt_units,
}


def weight_units(
    arch: ArchConfig,
    rank: int,
    tp_size: int,
    experts: Sequence[Sequence[int]] | None = None,
) -> tuple[WeightUnit, ...]:
    """Units in the order the forward pass acquires them: embed, layer.0 ..., norm, head.

    Units of a layer's routed experts, `layer.0.expert.0` ..., follow their layer. A model without
    a final norm has no `norm` unit.

    Args:
        rank: place on the tensor-parallel axis, of `tp_size` ranks.
        experts: logical experts that this rank holds whole, for each layer (none for dense ones);
            None: all of them, their inner width split over the axis.

    Raises:
        ConfigError: unknown family, or the model cannot be split over `tp_size` ranks.
    """
    if arch.family not in _UNITS:
        raise ConfigError(
            f"Model family {arch.family!r} is not supported.", f"Use one of {sorted(_UNITS)}."
        )
    reasons = arch.why_not_tp(tp_size, whole_experts=experts is not None)
    if reasons:
        raise ConfigError(
            f"The model cannot be split over {tp_size} ranks: {'; '.join(reasons)}.",
            "Choose another tensor-parallel size.",
            param="tp",
        )
    shard = Shard(rank=rank, size=tp_size)
    return add_experts(_UNITS[arch.family](arch, shard), arch, shard, experts)
