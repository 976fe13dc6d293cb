"""Streamed replicas of several data-parallel groups: what they refuse, and how a rank counts. Pure.

The ranks of one node read all units but their own routed experts together and hold them once, so
for each rank 1/N of their bytes counts, on disk and in memory. Experts are each rank's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cluster.base.errors import ConfigError
from cluster.base.moe_spec import MoeSectionSpec
from cluster.base.offload_spec import OffloadSpec
from offload.layout import PAGE_BYTES
from offload.model_shape import LayerShape, ModelShape, UnitShape
from offload.pieces import piece_bytes


def refuse_moves(moe: MoeSectionSpec, param: str) -> None:
    """What takes experts that come and go.

    Raises:
        ConfigError: it is asked for.
    """
    asked = {
        "balance.enabled": moe.balance.enabled,
        "failover.enabled": moe.failover.enabled and "enabled" in moe.failover.model_fields_set,
        "failover.lost_groups": moe.failover.lost_groups not in ("auto", 0),
    }
    for key, is_asked in asked.items():
        if is_asked:
            raise ConfigError(
                f"{key} is set, but engine is offload: a rank streams the experts that its packed "
                "file holds, so they cannot move.",
                f"Leave {key} out (limits.max_rank_restarts replaces lost ranks), or set "
                "engine: expert_parallel.",
                param=f"{param}.{key}",
            )


def refuse_with_groups(asked: OffloadSpec, param: str) -> None:
    """Settings of a streamed model that ranks in lock-step cannot have.

    Raises:
        ConfigError: one of them is set.
    """
    why = {
        "pack": (not asked.pack, "each rank packs the pieces that it reads"),
        "micro_batch": (
            asked.micro_batch != "auto",
            "groups with different steps would cut them into different numbers of exchanges",
        ),
        "kv_home": (asked.kv_home == "streamed", "a streamed cache cuts steps into micro-batches"),
        "share_resident": (
            asked.share_resident == "always",
            "its ranks have their layers in common anyway, and other replicas have others",
        ),
    }
    for key, (is_set, reason) in why.items():
        if is_set:
            value = str(getattr(asked, key)).lower()
            raise ConfigError(
                f"{key} is {value} with data-parallel groups: {reason}.",
                f"Leave {key} out, or parallel.dp.",
                param=f"{param}.{key}",
            )


def shared_shape(model: ModelShape, num_sharing: int, num_held: Sequence[int]) -> ModelShape:
    """One rank's part of a model that so many hold together.

    Args:
        num_held: routed experts of each layer that a rank holds, at most.
    """
    spare = PAGE_BYTES * max(0, len(model.fixed_units) - 1)  # each record is rounded to pages
    return replace(
        model,
        layers=tuple(
            _shared_layer(layer, num_sharing, held)
            for layer, held in zip(model.layers, num_held, strict=True)
        ),
        fixed_units=tuple(_shared_unit(unit, num_sharing) for unit in model.fixed_units),
        fixed_bytes=piece_bytes(model.fixed_bytes, num_sharing) + spare,
    )


def _shared_layer(layer: LayerShape, num_sharing: int, num_held: int) -> LayerShape:
    """A rank gets as many rows for its experts as its own tokens have, from all groups together."""
    return LayerShape(
        base=_shared_unit(layer.base, num_sharing),
        experts=layer.experts[:num_held],
        top_k=min(layer.top_k, num_held),
        routed=tuple(expert.name for expert in layer.experts),
    )


def _shared_unit(unit: UnitShape, num_sharing: int) -> UnitShape:
    return replace(
        unit,
        native_bytes=piece_bytes(unit.native_bytes, num_sharing),
        int8_bytes=piece_bytes(unit.int8_bytes, num_sharing),
        int4_bytes=piece_bytes(unit.int4_bytes, num_sharing),
    )
