"""The engine of a replica from its plan: one scheduler, or one per data-parallel group."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cluster.base.plan import ModelPlan, from_json
from moe.expert_table import ExpertTable
from replicas.engine.engine_loop import EngineLoop, OnDeltas, OnFatal
from replicas.engine.lockstep import ExpertOrders
from replicas.engine.lockstep_scheduler import ChooseScheme, LockstepScheduler
from replicas.engine.scheduler import Scheduler
from replicas.engine.scheduler_config import SchedulerConfig
from replicas.engine.speculation import SpeculationConfig
from replicas.leader.expert_balancer import ExpertBalancer
from replicas.worker.leader_link import LeaderLink
from replicas.worker.link_executor import LinkExecutor
from replicas.worker.lockstep_executor import LockstepExecutor

# Ranks that watch each other know who is late; the loop, which does not, waits for their account.
_ACCOUNT_MARGIN_S = 1.0


def make_engine(
    plan: ModelPlan,
    link: LeaderLink,
    facts: Mapping[str, Any],
    *,
    expert_orders: Callable[[], ExpertOrders] = ExpertOrders,
    on_deltas: OnDeltas,
    on_fatal: OnFatal,
) -> EngineLoop:
    """The loop over the ranks at the other end of `link`, not yet started.

    Args:
        facts: what rank 0 found out while it loaded.
        expert_orders: see `LockstepScheduler`.
    """
    limits, timeout_s = scheduler_config(plan), plan.scheduler.step_timeout_s
    if plan.experts is None:
        return EngineLoop(
            Scheduler(limits, plan.eos_token_ids),
            LinkExecutor(link),
            on_deltas=on_deltas,
            on_fatal=on_fatal,
            step_timeout_s=timeout_s,
        )
    return EngineLoop(
        LockstepScheduler(
            limits,
            plan.dp_size,
            choose_scheme=scheme_chooser(facts["schemes"], plan.tp_size),
            eos_token_ids=plan.eos_token_ids,
            expert_orders=expert_orders,
        ),
        LockstepExecutor(link, dp_size=plan.dp_size, tp_size=plan.tp_size),
        on_deltas=on_deltas,
        on_fatal=on_fatal,
        step_timeout_s=timeout_s + _ACCOUNT_MARGIN_S,
    )


def make_balancer(
    plan: ModelPlan, facts: Mapping[str, Any], nodes: Sequence[str]
) -> ExpertBalancer | None:
    """Who decides where experts are; None where they are not spread.

    Args:
        facts: what rank 0 found out while it loaded.
        nodes: node of each rank.
    """
    if plan.experts is None:
        return None
    tables = [from_json(ExpertTable, table) for table in facts["experts"]]
    return ExpertBalancer(tables, nodes, max_moves=plan.experts.max_moves)


def scheme_chooser(table: Sequence[Sequence[Any]], tp_size: int) -> ChooseScheme:
    """Looks the exchange of a step up.

    Args:
        table: (most rows per rank, scheme, why), ascending; larger steps count as the last entry.
        tp_size: ranks that share the rows of a group.
    """
    bounds = [int(rows) for rows, _, _ in table]

    def choose(num_tokens: int) -> tuple[str, str]:
        rows = -(-num_tokens // tp_size)
        index = min(bisect.bisect_left(bounds, rows), len(table) - 1)
        _, scheme, reason = table[index]
        return str(scheme), str(reason)

    return choose


def scheduler_config(plan: ModelPlan) -> SchedulerConfig:
    """Limits of each of the replica's schedulers."""
    limits, drafts = plan.scheduler, plan.scheduler.speculation
    return SchedulerConfig(
        max_running_requests=limits.max_running_requests,
        max_step_tokens=limits.max_step_tokens,
        max_context=limits.max_context,
        block_size=plan.kv.block_size,
        num_blocks=plan.kv.num_blocks,
        prefix_caching=plan.kv.prefix_caching,
        max_waiting_requests=limits.max_waiting_requests,
        speculation=None
        if drafts is None
        else SpeculationConfig(
            num_tokens=drafts.num_tokens, min_ngram=drafts.min_ngram, max_ngram=drafts.max_ngram
        ),
    )
