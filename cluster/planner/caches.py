"""Shares what placement left of the memory among the KV caches.

On a CPU node the automatic caches of all its ranks get equal parts of `CPU_KV_SHARE` of what is
left; on a GPU a rank's cache gets all that its device has left. Nobody takes more than it can use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.dist.topology import Topology
from cluster.planner.kv_sizing import KvSize, size_kv
from cluster.planner.memory import CPU_KV_SHARE, gpu_budget_bytes
from cluster.planner.packing import NodeLoad
from cluster.planner.placement import Placed


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """One model's cache, and what its tightest rank could hold altogether."""

    size: KvSize
    available_bytes: int


def size_caches(
    placed: Sequence[Placed], loads: Sequence[NodeLoad], topology: Topology
) -> list[Cache]:
    """Decide the cache of every model.

    Raises:
        ConfigError: one cannot hold a single request.
    """
    sizes = [
        size_kv(model.draft.kv, _room_bytes(model, placed, loads, topology)) for model in placed
    ]
    left = [load.free_bytes for load in loads]
    for model, size in zip(placed, sizes, strict=True):
        if not model.draft.on_gpu:
            grown = _cache_bytes(model, size) - model.draft.kv.fixed_bytes
            for node in set(model.nodes):
                left[node] -= model.ranks_on(node) * grown
    return [
        Cache(size=size, available_bytes=_available_bytes(model, size, left, topology))
        for model, size in zip(placed, sizes, strict=True)
    ]


def _room_bytes(
    model: Placed, placed: Sequence[Placed], loads: Sequence[NodeLoad], topology: Topology
) -> int:
    """What an automatic cache of one rank may take on its tightest node."""
    if model.draft.on_gpu:
        return _device_bytes(model, topology) - model.draft.fixed_bytes
    return min(
        int(loads[node].free_bytes * CPU_KV_SHARE) // max(1, _num_auto_ranks(placed, node))
        for node in model.nodes
    )


def _num_auto_ranks(placed: Sequence[Placed], node: int) -> int:
    return sum(
        model.ranks_on(node)
        for model in placed
        if not model.draft.on_gpu and isinstance(model.draft.kv.memory, str)
    )


def _cache_bytes(model: Placed, size: KvSize) -> int:
    return size.num_blocks.value * model.draft.kv.block_bytes


def _available_bytes(model: Placed, size: KvSize, left: Sequence[int], topology: Topology) -> int:
    """On a GPU, what may be used of the device; on a CPU, the rank and its node's headroom."""
    if model.draft.on_gpu:
        return _device_bytes(model, topology)
    own = model.draft.weights_bytes + model.draft.space.total_bytes + _cache_bytes(model, size)
    return own + min(left[node] for node in model.nodes)


def _device_bytes(model: Placed, topology: Topology) -> int:
    return min(gpu_budget_bytes(topology.nodes[node]) for node in model.nodes)
