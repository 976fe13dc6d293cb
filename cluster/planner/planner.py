"""Spec and topology -> plan: composes the decisions, in the only order that works.

Sources first (what is in the checkpoints), then device, dtype and placement, and last what is
left for the caches. Pure but for reading checkpoints; equal inputs give equal plans.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.base.errors import ConfigError
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
from cluster.base.spec import ClusterSpec, MoeSectionSpec, SpeculationSpec
from cluster.dist.topology import Topology
from cluster.planner.caches import Cache, size_caches
from cluster.planner.cpus import CpuDemand, front_share, share_cpus
from cluster.planner.decisions import Decision, choose_devices, choose_threads
from cluster.planner.drafts import Draft
from cluster.planner.front import is_loopback, plan_gateway
from cluster.planner.hub import Hub
from cluster.planner.overflow import check_overflows, overflow_plan, overflow_warnings
from cluster.planner.packing import NodeLoad, empty_loads
from cluster.planner.placement import Placed, draft_all, place_all
from cluster.planner.sources import open_source
from cluster.planner.streaming import RatesSource, Streamer, probed_rates

_TIMEOUT_STEPS = 10
"""A step that takes so many times the prediction hangs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """A model's share of cores."""

    threads: Decision[int]
    cpus: Decision[float]
    leader_cpus: float


def make_plan(
    spec: ClusterSpec,
    topology: Topology,
    *,
    directory: Path | None = None,
    hub: Hub | None = None,
    rates: RatesSource = probed_rates,
) -> ClusterPlan:
    """Decide everything that the cluster file left open.

    Args:
        directory: what relative paths of the spec are relative to; default: the working directory.
        hub: where repositories come from; default: the local cache, then a download.
        rates: speeds of the machine, asked for only when a model's weights are streamed.

    Raises:
        ConfigError: a checkpoint is missing or unsupported, or the cluster does not fit.
    """
    topology = _with_cores(topology)
    sources = [
        open_source(index, model, directory or Path(), hub or Hub())
        for index, model in enumerate(spec.models)
    ]
    check_overflows(sources)
    loads = empty_loads(topology, spec.gateway.replicas)
    on_cpus = [source.index for source in sources if source.layout.spreads_experts]
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
        gateway=plan_gateway(spec.gateway, models, front_share(loads)),
        models=models,
        dashboard_port=spec.dashboard.port,
        warnings=tuple(_warnings(spec, models, placed, loads)),
    )


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
    if model.draft.on_gpu and isinstance(wanted, str):
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
            step_timeout_s=_step_timeout_s(draft),
            max_rank_restarts=spec.limits.max_rank_restarts,
            speculation=_speculation(draft),
        ),
        memory=MemoryPlan(
            weights_bytes=draft.weights_bytes,
            kv_bytes=kv_bytes,
            workspace_bytes=draft.space.total_bytes,
            available_bytes=cache.available_bytes,
        ),
        reasons=_reasons(draft, compute, cache),
        leader_cpus=compute.leader_cpus,
        nodes=tuple(topology.nodes[node].host for node in model.nodes),
        offload=streaming.offload_plan(_step_timeout_s(draft)) if streaming else None,
        speed=streaming.speed_plan() if streaming else None,
        overflow=overflow_plan(spec),
    )


def _step_timeout_s(draft: Draft) -> float:
    """The user's, or more where even the predicted step would come near it."""
    asked = draft.source.spec.limits.step_timeout
    if draft.streaming is None:
        return asked
    found = draft.streaming.found
    return max(asked, math.ceil(_TIMEOUT_STEPS * max(found.best.tpot_s, found.ttft_s)))


def _speculation(draft: Draft) -> SpeculationPlan | None:
    """The user's, or where nothing is said: on where weights are streamed."""
    asked = draft.source.spec.speculation
    if asked is None and draft.streaming is None:
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
    if draft.streaming is not None:
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
        capacity_factor=moe.capacity_factor,
        num_redundant=draft.layout.num_redundant,
        balance_interval_s=moe.balance.interval if moe.balance.enabled else None,
        max_moves=draft.layout.max_moves,
    )


def _reasons(draft: Draft, compute: Compute, cache: Cache) -> dict[str, str]:
    streaming = draft.streaming
    reasons = {
        "engine": draft.layout.reason if streaming is None else streaming.reason(),
        **_step_reasons(draft),
        "device": draft.device.reason,
        "dtype": draft.dtype.reason,
        "num_threads": compute.threads.reason,
        "cpus_per_rank": compute.cpus.reason,
        "kv.num_blocks": cache.size.num_blocks.reason,
        "scheduler.max_context": cache.size.max_context.reason,
    }
    return {key: reason for key, reason in reasons.items() if reason}


def _step_reasons(draft: Draft) -> dict[str, str]:
    """Why a streamed model's steps have their size, their deadline and drafts in them."""
    if draft.streaming is None:
        return {}
    spec = draft.source.spec
    size = "the largest step that the transfer of the weights hides, or that memory allows"
    deadline = f"{_TIMEOUT_STEPS} times the predicted longest step"
    return {
        "scheduler.max_step_tokens": size if spec.limits.max_step_tokens == "auto" else "",
        "scheduler.step_timeout_s": (
            deadline if _step_timeout_s(draft) > spec.limits.step_timeout else ""
        ),
        "scheduler.speculation": (
            "a streamed step costs the same with a few tokens more"
            if spec.speculation is None
            else ""
        ),
    }


def _warnings(
    spec: ClusterSpec,
    models: Sequence[ModelPlan],
    placed: Sequence[Placed],
    loads: Sequence[NodeLoad],
) -> Iterator[str]:
    if not is_loopback(spec.gateway.host):
        yield (
            f"gateway.host {spec.gateway.host}: everybody who can reach this address can use the "
            "cluster; there is no authentication."
        )
    for load in loads:
        if len(load.cpu_models) > load.cores:
            yield f"{len(load.cpu_models)} CPU ranks share {load.cores} cores on {load.host}."
    for model, where in zip(models, placed, strict=True):
        wanted = where.draft.source.spec.limits.max_running_requests
        if model.scheduler.max_running_requests < wanted:
            yield (
                f"{model.name}: max_running_requests {wanted} is lowered to "
                f"{model.scheduler.max_running_requests}: a step has only that many tokens."
            )
        yield from _streaming_warnings(model, where.draft)
        yield from overflow_warnings(model, models)
        if not model.eos_token_ids:
            yield f"{model.name}: the checkpoint names no end-of-text token; outputs end at length."


def _streaming_warnings(model: ModelPlan, draft: Draft) -> Iterator[str]:
    streaming, spec = draft.streaming, draft.source.spec
    if streaming is None:
        if spec.offload is not None:
            yield f"{model.name}: the model fits, so the `offload` section has no effect."
        return
    if streaming.fits:
        yield (
            f"{model.name}: engine offload is asked for although the model fits; predicted "
            f"{streaming.found.best.tokens_per_s:.3g} tokens/s, and "
            f"{streaming.resident_tokens_per_s:.3g} with engine: tensor_parallel."
        )
    elif streaming.why:
        yield f"{model.name}: served by an offload replica: {streaming.reason()}."
