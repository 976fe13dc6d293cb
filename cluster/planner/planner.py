"""Spec and topology -> plan: composes the decisions, in the only order that works.

Sources first (what is in the checkpoints), then device, dtype and placement, and last what is
left for the caches. Pure but for reading checkpoints; equal inputs give equal plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cluster.base.engine_spec import SpeculationSpec
from cluster.base.errors import ConfigError
from cluster.base.moe_spec import MoeSectionSpec
from cluster.base.plan import (
    ClusterPlan,
    EngineKind,
    ExpertPlan,
    KvPlan,
    MemoryPlan,
    ModelPlan,
    SchedulerPlan,
    SpeculationPlan,
)
from cluster.base.spec import ClusterSpec
from cluster.dist.topology import Topology
from cluster.planner.caches import Cache, size_caches
from cluster.planner.cpus import Compute, CpuDemand, front_share, share_cpus
from cluster.planner.decisions import Decision, choose_devices, choose_threads, why_experts_on_cpus
from cluster.planner.drafts import Draft
from cluster.planner.foreign_source import InspectSource, inspected
from cluster.planner.front import plan_gateway
from cluster.planner.hub import Hub
from cluster.planner.overflow import check_overflows, overflow_plan
from cluster.planner.packing import NodeLoad, empty_loads
from cluster.planner.placement import Placed, draft_all, place_all
from cluster.planner.reasons import reasons_of, warnings_of
from cluster.planner.sources import ModelSource, open_source
from cluster.planner.streaming import RatesSource, Streamer, probed_rates


def make_plan(
    spec: ClusterSpec,
    topology: Topology,
    *,
    directory: Path | None = None,
    hub: Hub | None = None,
    rates: RatesSource = probed_rates,
    inspect: InspectSource = inspected,
) -> ClusterPlan:
    """Decide everything that the cluster file left open.

    Args:
        directory: what relative paths of the spec are relative to; default: the working directory.
        hub: where repositories come from; default: the local cache, then a download.
        rates: speeds of the machine, asked for only when a model's weights are streamed.
        inspect: sizes of a model that only transformers computes.

    Raises:
        ConfigError: a checkpoint is missing or unsupported, or the cluster does not fit.
    """
    topology = _with_cores(topology)
    sources = [
        open_source(index, model, directory or Path(), hub or Hub(), inspect)
        for index, model in enumerate(spec.models)
    ]
    check_overflows(sources)
    loads = empty_loads(topology, spec.gateway.replicas)
    on_cpus = {source.index: why for source in sources if (why := _why_on_cpus(source))}
    drafts = draft_all(sources, choose_devices(spec.models, topology, on_cpus), loads)
    streamer = Streamer(rates=rates, directory=directory or Path())
    placed = place_all(drafts, loads, topology, streamer)
    compute = _share_cores(placed, loads)
    caches = size_caches(placed, loads, topology)
    models = tuple(
        _plan_model(model, share, cache, topology)
        for model, share, cache in zip(placed, compute, caches, strict=True)
    )
    return ClusterPlan(
        name=spec.cluster.name,
        gateway=plan_gateway(spec.gateway, models, front_share(loads), directory or Path()),
        models=models,
        dashboard_port=spec.dashboard.port,
        drain_s=spec.cluster.drain,
        warnings=tuple(warnings_of(spec, models, placed, loads)),
    )


def _why_on_cpus(source: ModelSource) -> str:
    if source.layout.spreads_experts:
        return why_experts_on_cpus(source.spec)
    return "transformers' own code is served on the CPU" if source.foreign else ""


def _with_cores(topology: Topology) -> Topology:
    """The nodes that can run a process of ours: a Ray head is often given no CPUs."""
    nodes = tuple(node for node in topology.nodes if node.cores > 0)
    if not nodes:
        raise ConfigError(
            "No node of the cluster has CPUs.", "Start Ray with --num-cpus of at least 1."
        )
    return Topology(nodes=nodes, links=topology.links)


def _share_cores(placed: Sequence[Placed], loads: Sequence[NodeLoad]) -> list[Compute]:
    """Threads and reserved CPUs of every model's ranks; the tightest node decides."""
    threads = [_threads(model, loads) for model in placed]
    demands = [
        CpuDemand(
            param=model.draft.source.param("resources.cpus_per_rank"),
            wanted=model.draft.source.spec.resources.cpus_per_rank,
            num_threads=count.value,
            ranks=tuple(model.ranks_on(node) for node in range(len(loads))),
        )
        for model, count in zip(placed, threads, strict=True)
    ]
    front = front_share(loads)
    return [
        Compute(threads=count, cpus=cpus, leader_cpus=front)
        for count, cpus in zip(threads, share_cpus(demands, loads), strict=True)
    ]


def _threads(model: Placed, loads: Sequence[NodeLoad]) -> Decision[int]:
    wanted = model.draft.source.spec.resources.threads_per_rank
    streaming = model.draft.streaming
    helps = streaming is not None and streaming.placement.host_experts
    if model.draft.on_gpu and isinstance(wanted, str) and not helps:
        return Decision(value=1, reason="the GPU computes")
    choices = [
        choose_threads(wanted, loads[node].cores, loads[node].num_ranks) for node in model.nodes
    ]
    return min(choices, key=lambda choice: choice.value)


def _plan_model(model: Placed, compute: Compute, cache: Cache, topology: Topology) -> ModelPlan:
    draft, source = model.draft, model.draft.source
    spec, arch, streaming = source.spec, source.arch, draft.streaming
    kv_bytes = cache.size.num_blocks.value * draft.kv.block_bytes
    return ModelPlan(
        name=spec.name,
        path=str(source.checkpoint.directory),
        source=source.written,
        family=arch.family,
        engine=_engine(draft),
        replicas=spec.replicas,
        tp_size=draft.tp_size,
        dp_size=draft.layout.dp_size,
        experts=_experts(draft),
        device=draft.device.device,
        dtype=draft.dtype.value,
        quantization=spec.quantization,
        kernels=spec.kernels,
        attention_backend=spec.attention_backend,
        tool_call_parser=spec.tool_call_parser,
        num_threads=compute.threads.value,
        cpus_per_rank=compute.cpus.value,
        gpus_per_rank=1.0 if draft.on_gpu else 0.0,
        vocab_size=arch.vocab_size,
        eos_token_ids=source.checkpoint.eos_token_ids(arch.eos_token_ids),
        kv=KvPlan(
            block_size=draft.kv.block_size,
            num_blocks=cache.size.num_blocks.value,
            dtype=draft.dtype.value,
            bytes_per_rank=kv_bytes,
            prefix_caching=spec.kv_cache.prefix_caching,
        ),
        scheduler=SchedulerPlan(
            max_running_requests=draft.kv.max_running_requests,
            max_step_tokens=draft.max_step_tokens,
            max_context=cache.size.max_context.value,
            max_waiting_requests=spec.limits.max_waiting_requests,
            step_timeout_s=draft.step_timeout_s,
            max_rank_restarts=spec.limits.max_rank_restarts,
            speculation=_speculation(draft),
        ),
        memory=MemoryPlan(
            weights_bytes=draft.weights_bytes,
            kv_bytes=kv_bytes,
            workspace_bytes=draft.space.total_bytes,
            available_bytes=cache.available_bytes,
            shared_bytes=draft.shared_bytes,
            host_bytes=draft.planned_host_bytes,
        ),
        reasons=reasons_of(draft, compute, cache),
        leader_cpus=compute.leader_cpus,
        nodes=tuple(topology.nodes[node].host for node in model.nodes),
        offload=streaming.offload_plan(draft.step_timeout_s) if streaming else None,
        speed=streaming.speed_plan() if streaming else None,
        overflow=overflow_plan(spec),
        zero3=draft.zero3,
    )


def _speculation(draft: Draft) -> SpeculationPlan | None:
    """The user's, or where nothing is said: on where weights are streamed."""
    asked = draft.source.spec.speculation
    if asked is None and not draft.moves_weights:
        return None
    chosen = asked or SpeculationSpec()
    if chosen.method == "none":
        return None
    return SpeculationPlan(
        num_tokens=chosen.num_speculative_tokens,
        min_ngram=chosen.prompt_lookup_min,
        max_ngram=chosen.prompt_lookup_max,
    )


def _engine(draft: Draft) -> EngineKind:
    if draft.moves_weights:
        return EngineKind.OFFLOAD
    spreads = draft.layout.spreads_experts
    return EngineKind.EXPERT_PARALLEL if spreads else EngineKind.TENSOR_PARALLEL


def _experts(draft: Draft) -> ExpertPlan | None:
    if not draft.layout.spreads_experts:
        return None
    moe = draft.source.spec.moe or MoeSectionSpec()
    return ExpertPlan(
        experts_per_rank=draft.layout.experts_per_rank(draft.source.arch),
        exchange=moe.exchange,
        dispatch=moe.dispatch,
        combine=moe.combine,
        probe_s=moe.probe_budget,
        capacity_factor=moe.capacity_factor,
        num_redundant=draft.layout.num_redundant,
        balance_interval_s=moe.balance.interval if moe.balance.enabled else None,
        max_moves=draft.layout.max_moves,
        survives=draft.layout.survives,
        lost_groups=draft.layout.lost_groups,
        spare_slots=max(draft.layout.spare_slots(draft.source.arch).values(), default=0),
        spare_bytes=draft.space.spare_bytes,
        rejoins=moe.failover.rejoin,
    )
