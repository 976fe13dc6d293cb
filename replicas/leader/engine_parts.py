"""The engine of a replica from its plan: one scheduler, or one per data-parallel group."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from cluster.base.plan import ModelPlan, from_json
from moe.expert_table import ExpertTable
from replicas.engine.engine_loop import EngineLoop, OnDeltas, OnFatal, Recover
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


AnyExecutor = LinkExecutor | LockstepExecutor


class Ranks(Protocol):
    """The present ranks as the engine uses them; see `RankSide`."""

    executor: AnyExecutor | None

    def choose_scheme(self, num_tokens: int) -> tuple[str, str]:
        """The exchange of a step, and why; of expert-parallel ranks."""
        ...

    def expert_orders(self) -> ExpertOrders:
        """What the next step says of experts; of expert-parallel ranks."""
        ...

    def groups(self) -> Sequence[int]:
        """Data-parallel groups that have ranks; of expert-parallel ranks."""
        ...


def make_engine(
    plan: ModelPlan,
    ranks: Ranks,
    *,
    on_deltas: OnDeltas,
    on_fatal: OnFatal,
    recover: Recover,
) -> EngineLoop:
    """The loop over started ranks, not yet started itself.

    Args:
        recover: see `EngineLoop`.
    """
    limits, timeout_s = scheduler_config(plan), plan.scheduler.step_timeout_s
    scheduler: Scheduler | LockstepScheduler
    if plan.experts is None:
        scheduler = Scheduler(limits, plan.eos_token_ids)
    else:
        timeout_s += _ACCOUNT_MARGIN_S
        scheduler = LockstepScheduler(
            limits,
            plan.dp_size,
            choose_scheme=ranks.choose_scheme,
            eos_token_ids=plan.eos_token_ids,
            expert_orders=ranks.expert_orders,
            serving=ranks.groups,
        )
    executor: Any = ranks.executor
    return EngineLoop(
        scheduler,
        executor,
        on_deltas=on_deltas,
        on_fatal=on_fatal,
        step_timeout_s=timeout_s,
        recover=recover,
    )


def make_executor(plan: ModelPlan, link: LeaderLink) -> AnyExecutor:
    """The executor of steps over the ranks at the other end of a link."""
    if plan.experts is None:
        return LinkExecutor(link)
    return LockstepExecutor(link, tp_size=plan.tp_size)


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
