"""The slice of the plan that each rank of a replica is built from. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.base.plan import ModelPlan
from moe.expert_table import ExpertTable
from replicas.worker.frames import LinkAddress
from replicas.worker.plan import ExpertRankPlan, WorkerPlan

Place = tuple[str, int]
"""Host and port."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Meetings:
    """Where the ranks of one epoch meet each other and their leader."""

    epoch: str
    link: LinkAddress
    secret: str
    tensor_groups: tuple[Place, ...]
    """At the first rank of each tensor-parallel group."""
    peers: Place | None = None
    """At rank 0, for all ranks of an expert-parallel replica."""
    nodes: tuple[str, ...] = ()
    """Node of each rank of an expert-parallel replica."""


def worker_plan(
    plan: ModelPlan, rank: int, meetings: Meetings, joins_with: Sequence[ExpertTable] = ()
) -> WorkerPlan:
    """What rank `rank` is built from.

    Args:
        joins_with: where experts will be, for a rank that takes a lost one's place.
    """
    drafts = plan.scheduler.speculation
    store_host, store_port = meetings.tensor_groups[rank // plan.tp_size]
    return WorkerPlan(
        rank=rank,
        tp_size=plan.tp_size,
        epoch=meetings.epoch,
        model_path=plan.path,
        device=plan.device,
        dtype=plan.dtype,
        kv_dtype=plan.kv.dtype,
        quantization=plan.quantization,
        kernels=plan.kernels,
        attention_backend=plan.attention_backend,
        draft_tokens=drafts.num_tokens if drafts else 0,
        block_size=plan.kv.block_size,
        num_blocks=plan.kv.num_blocks,
        max_context=plan.scheduler.max_context,
        num_threads=plan.num_threads,
        collective_timeout_s=plan.scheduler.step_timeout_s,
        store_host=store_host,
        store_port=store_port,
        link_path=meetings.link.path,
        link_host=meetings.link.host,
        link_port=meetings.link.port,
        link_secret=meetings.secret,
        offload=plan.offload,
        zero3=plan.zero3,
        experts=_expert_place(plan, meetings, joins_with),
    )


def _expert_place(
    plan: ModelPlan, meetings: Meetings, joins_with: Sequence[ExpertTable]
) -> ExpertRankPlan | None:
    if plan.experts is None or meetings.peers is None:
        return None
    return ExpertRankPlan(
        node_of_W=meetings.nodes,
        peers_host=meetings.peers[0],
        peers_port=meetings.peers[1],
        max_rows=-(-plan.scheduler.max_step_tokens // plan.tp_size),
        exchange=plan.experts.exchange,
        dispatch=plan.experts.dispatch,
        combine=plan.experts.combine,
        probe_s=plan.experts.probe_s,
        capacity_factor=plan.experts.capacity_factor,
        num_redundant=plan.experts.num_redundant,
        survives=plan.experts.survives,
        joins_later=bool(joins_with),
        tables=tuple(joins_with),
    )
