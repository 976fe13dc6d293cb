"""Puts the replicas of drafted models on nodes, or refuses with what would fit.

Fills the `NodeLoad`s it is given, models in the order of the file, replica by replica.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.base.amount_text import size_text
from cluster.base.errors import ConfigError
from cluster.dist.topology import Topology
from cluster.planner.decisions import DeviceChoice, choose_dtype
from cluster.planner.drafts import Draft, draft_model, redraft, weight_bytes
from cluster.planner.memory import (
    CPU_KV_SHARE,
    CUDA_CONTEXT_BYTES,
    FRONT_PROCESS_BYTES,
    RANK_PROCESS_BYTES,
    gpu_budget_bytes,
)
from cluster.planner.packing import NodeLoad, RankNeed, fewest_nodes, least_loaded
from cluster.planner.refusal import device_full, host_full, node_full, nodes_full
from cluster.planner.sources import ModelSource
from cluster.planner.streaming import Streamer
from cluster.planner.streaming_room import Room, least_draft
from cluster.planner.zero3 import hold_with_zero3


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A drafted model and the node index of each tensor-parallel group, replica by replica."""

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
        layout = source.layout
        per_rank = weight_bytes(source, layout, "float32")
        dtype = choose_dtype(
            spec.dtype,
            source.arch.dtype,
            device.device,
            per_rank * layout.num_ranks * spec.replicas,
            room,
        )
        drafts.append(draft_model(source, device, dtype))
    return drafts


def place_all(
    drafts: Sequence[Draft], loads: Sequence[NodeLoad], topology: Topology, streamer: Streamer
) -> list[Placed]:
    """Decide which models are streamed and find a node for every replica.

    Streamed models come last: an automatic budget takes what the others leave.

    Raises:
        ConfigError: a model fits neither whole nor streamed.
    """
    placed: dict[int, Placed] = {}
    streamed: dict[int, ConfigError | None] = {}
    for index, draft in enumerate(drafts):
        engine = draft.source.spec.engine
        is_foreign = draft.source.foreign is not None
        spreads = draft.layout.spreads_experts and engine != "offload"
        stays_whole = engine == "tensor_parallel" or spreads or is_foreign
        refusal = None if stays_whole else _why_not_whole(draft, loads, topology)
        if engine == "offload" or is_foreign or refusal is not None:
            streamed[index] = refusal
        else:
            placed[index] = place(_with_spare_room(draft, loads, topology), loads, topology)
    for num_done, (index, refusal) in enumerate(streamed.items()):
        room = _room(drafts[index], loads, topology, len(streamed) - num_done)
        draft = _stream(drafts[index], room, streamer, refusal)
        placed[index] = place(draft, loads, topology)
    return [placed[index] for index in range(len(drafts))]


def _with_spare_room(draft: Draft, loads: Sequence[NodeLoad], topology: Topology) -> Draft:
    """The draft, with room for the experts of a lost group where that is left to what there is.

    Where the memory holds twice as much: the cache is to have as large a part of what is left.
    """
    if not draft.layout.is_failover_open:
        return draft
    roomy = redraft(draft, lost_groups=1)
    twice = replace(roomy.space, spare_bytes=2 * roomy.space.spare_bytes)
    try:
        place(replace(roomy, space=twice), _copied(loads), topology)
    except ConfigError:
        return draft
    return roomy


def _copied(loads: Sequence[NodeLoad]) -> list[NodeLoad]:
    """To place something on for the sake of the question."""
    return [replace(load, cpu_models=[*load.cpu_models]) for load in loads]


def _why_not_whole(
    draft: Draft, loads: Sequence[NodeLoad], topology: Topology
) -> ConfigError | None:
    """Why the model cannot be held whole, with a cache that serves somebody; None if it can."""
    least = least_draft(draft)
    asked = draft.source.spec.offload
    if asked is not None and isinstance(asked.device_memory, int):
        need = least.fixed_bytes - draft.space.process_bytes
        if need > asked.device_memory:
            have = size_text(asked.device_memory)
            return ConfigError(f"each rank needs {size_text(need)} and device_memory is {have}")
    try:
        place(least, _copied(loads), topology)
    except ConfigError as error:
        return error
    return None


def _stream(draft: Draft, room: Room, streamer: Streamer, refusal: ConfigError | None) -> Draft:
    if draft.source.foreign is not None:
        return hold_with_zero3(draft, room, streamer.directory)
    chosen = draft.source.spec.engine == "offload"
    why = ""
    if not chosen and refusal is not None:
        weights = f"{size_text(draft.weights_bytes)} of weights per rank"
        # Without a remedy it is the user's own bound; else the machine's, told at length.
        why = f"{weights} do not fit the machine" if refusal.remedy else refusal.cause
    try:
        return streamer.stream(draft, room, why=why, fits=refusal is None)
    except ConfigError as error:
        if chosen or refusal is None or not refusal.remedy:
            raise
        raise ConfigError(
            f"{refusal.cause} Streaming the weights fails too: {error.cause}",
            f"{refusal.remedy} For streaming: {error.remedy}",
            param=refusal.param,
        ) from error


def _room(draft: Draft, loads: Sequence[NodeLoad], topology: Topology, num_models: int) -> Room:
    """What a rank of a streamed model may use; `num_models` of them share what is left."""
    spec, each = draft.source.spec, draft.layout.num_ranks
    replicas = -(-spec.replicas // len(loads))
    if draft.on_gpu:
        replicas = max(draft.device.nodes.count(node) for node in draft.device.nodes)
    ranks = replicas * each
    free = max(load.free_bytes for load in loads) - num_models * replicas * FRONT_PROCESS_BYTES
    host = free // num_models // ranks - RANK_PROCESS_BYTES
    device, beside, kind = host, 0, ""
    alone = free // num_models // each - RANK_PROCESS_BYTES
    if draft.on_gpu:
        budgets = [gpu_budget_bytes(topology.nodes[node]) for node in draft.device.nodes]
        device, beside = min(budgets) - CUDA_CONTEXT_BYTES, max(0, host)
        kinds = {gpu.kind for node in draft.device.nodes for gpu in topology.nodes[node].devices}
        kind = ", ".join(sorted(kinds))
    threads = spec.resources.threads_per_rank
    cores = min(load.cores for load in loads)
    return Room(
        device_bytes=device,
        alone_bytes=alone,
        replicas=replicas,
        auto_share=CPU_KV_SHARE,
        num_threads=max(1, cores // ranks) if isinstance(threads, str) else threads,
        host_bytes=beside,
        device_kind=kind,
    )


def place(draft: Draft, loads: Sequence[NodeLoad], topology: Topology) -> Placed:
    """Find a node for every replica and book it there.

    Raises:
        ConfigError: a rank does not fit on its GPU, or a replica on no node.
    """
    nodes = _place_on_gpus(draft, loads, topology) if draft.on_gpu else _place_on_cpus(draft, loads)
    return Placed(draft=draft, nodes=nodes)


def _place_on_gpus(draft: Draft, loads: Sequence[NodeLoad], topology: Topology) -> tuple[int, ...]:
    """Groups on the nodes whose devices were chosen; a replica's first brings its leader."""
    beside = draft.tp_size * draft.booked_host_bytes
    for group, index in enumerate(draft.device.nodes):
        node, load = topology.nodes[index], loads[index]
        budget = gpu_budget_bytes(node)
        if draft.fixed_bytes > budget:
            raise device_full(draft, budget, len(node.devices))
        if group % draft.layout.dp_size == 0:
            load.add_leader()
        load.add_ranks(draft.source.index, draft.tp_size, None)
        if draft.layout.spreads_experts and beside > load.free_bytes:
            raise host_full(draft, load.free_bytes)
        load.free_bytes -= beside
    return draft.device.nodes


def _place_on_cpus(draft: Draft, loads: Sequence[NodeLoad]) -> tuple[int, ...]:
    nodes: list[int] = []
    for replica in range(draft.source.spec.replicas):
        if draft.layout.spreads_experts and draft.streaming is None:
            nodes += _place_groups(draft, loads, replica)
            continue
        # Groups that stream share their node's memory, so they are on one, like tensor slices.
        num_ranks = draft.layout.num_ranks
        needs = [_need(draft, _taken_bytes(draft, load)) for load in loads]
        node = least_loaded(loads, num_ranks, needs)
        if node is None:
            room = max(load.free_bytes for load in loads) - FRONT_PROCESS_BYTES
            raise node_full(draft, replica, room)
        loads[node].add_replica(draft.source.index, num_ranks, needs[node])
        nodes += [node] * draft.layout.dp_size
    return tuple(nodes)


def _taken_bytes(draft: Draft, load: NodeLoad) -> int:
    """What one more rank takes of a node: less where a replica has brought what all share."""
    is_there = draft.source.index in load.cpu_models
    return draft.fixed_bytes - (draft.shared_bytes if is_there else 0)


def _place_groups(draft: Draft, loads: Sequence[NodeLoad], replica: int) -> list[int]:
    """A node for each tensor-parallel group of an expert-parallel replica, node by node."""
    tp_size, dp_size = draft.layout.tp_size, draft.layout.dp_size
    need = _need(draft, draft.fixed_bytes)
    nodes = fewest_nodes(loads, dp_size, tp_size, need)
    if nodes is None:
        raise nodes_full(draft, replica, [max(0, load.free_bytes) for load in loads])
    for index, node in enumerate(nodes):
        loads[node].add_ranks(draft.source.index, tp_size, need)
        if index == 0:
            loads[node].add_leader()
    return nodes


def _need(draft: Draft, num_bytes: int) -> RankNeed:
    wanted = draft.source.spec.resources.cpus_per_rank
    return RankNeed(num_bytes=num_bytes, cpus=0.0 if isinstance(wanted, str) else float(wanted))
