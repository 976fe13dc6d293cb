"""Puts the replicas of drafted models on nodes, or refuses with what would fit.

Fills the `NodeLoad`s it is given, models in the order of the file, replica by replica.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.dist.topology import Topology
from cluster.planner.decisions import DeviceChoice, choose_dtype
from cluster.planner.drafts import Draft, draft_model
from cluster.planner.memory import FRONT_PROCESS_BYTES, gpu_budget_bytes
from cluster.planner.packing import NodeLoad, least_loaded
from cluster.planner.refusal import device_full, node_full
from cluster.planner.sources import ModelSource
from replicas.models.memory import weight_bytes_per_rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A drafted model and the node index of each of its replicas."""

    draft: Draft
    nodes: tuple[int, ...]

    def ranks_on(self, node: int) -> int:
        """Ranks of this model on a node."""
        return self.nodes.count(node) * self.draft.tp_size


def draft_all(
    sources: Sequence[ModelSource], devices: Sequence[DeviceChoice], loads: Sequence[NodeLoad]
) -> list[Draft]:
    """Decide every model's dtype; models on the CPU share its memory evenly for that question."""
    num_cpu_models = sum(choice.device == "cpu" for choice in devices)
    room = sum(max(0, load.free_bytes) for load in loads) // max(1, num_cpu_models)
    drafts = []
    for source, device in zip(sources, devices, strict=True):
        spec = source.spec
        per_rank = weight_bytes_per_rank(source.arch, spec.parallel.tp, "float32")
        dtype = choose_dtype(
            spec.dtype,
            source.arch.dtype,
            device.device,
            per_rank * spec.parallel.tp * spec.replicas,
            room,
        )
        drafts.append(draft_model(source, device, dtype))
    return drafts


def place(draft: Draft, loads: Sequence[NodeLoad], topology: Topology) -> Placed:
    """Find a node for every replica and book it there.

    Raises:
        ConfigError: a rank does not fit on its GPU, or a replica on no node.
    """
    nodes = _place_on_gpus(draft, loads, topology) if draft.on_gpu else _place_on_cpus(draft, loads)
    return Placed(draft=draft, nodes=nodes)


def _place_on_gpus(draft: Draft, loads: Sequence[NodeLoad], topology: Topology) -> tuple[int, ...]:
    for index in draft.device.nodes:
        node = topology.nodes[index]
        budget = gpu_budget_bytes(node)
        if draft.fixed_bytes > budget:
            raise device_full(draft, budget, len(node.devices))
        loads[index].add_replica(draft.source.index, draft.tp_size, None)
    return draft.device.nodes


def _place_on_cpus(draft: Draft, loads: Sequence[NodeLoad]) -> tuple[int, ...]:
    nodes: list[int] = []
    for _ in range(draft.source.spec.replicas):
        node = least_loaded(loads, draft.tp_size, draft.fixed_bytes)
        if node is None:
            room = max(load.free_bytes for load in loads) - FRONT_PROCESS_BYTES
            raise node_full(draft, len(nodes), room)
        loads[node].add_replica(draft.source.index, draft.tp_size, draft.fixed_bytes)
        nodes.append(node)
    return tuple(nodes)
