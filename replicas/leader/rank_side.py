"""Everything that begins and ends with one set of ranks, and the change from one set to the next.

The engine outlives its ranks: when some are lost and the plan allows it, all are replaced, under an
epoch of their own, and the engine's requests go on with the tokens they have.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from cluster.base.errors import PenstockError
from cluster.base.ids import new_epoch
from cluster.base.plan import ExpertPlan, ModelPlan
from replicas.engine.lockstep import ExpertOrders
from replicas.leader.engine_parts import AnyExecutor, make_balancer, make_executor, scheme_chooser
from replicas.leader.expert_balancer import ExpertBalancer
from replicas.leader.expert_upkeep import ExpertUpkeep
from replicas.leader.expert_watch import ExpertWatch
from replicas.leader.record import ExpertRecord
from replicas.leader.worker_group import OnProgress, WorkerGroup

log = logging.getLogger(__name__)

_ACCOUNT_S = 1.5
_HOUR_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RankEvents:
    """Whom to tell; all are called on the asyncio loop."""

    on_progress: OnProgress
    on_lost: Callable[[PenstockError], None]
    """A rank of the present set is gone."""
    on_experts: Callable[[ExpertRecord], None]
    newest_step: Callable[[], int]


class RankSide:
    """The ranks of a replica, now these, later perhaps others.

    Args:
        make_group: a new set of worker actors under an epoch, not yet started.
        host: the leader's address.
    """

    def __init__(
        self,
        plan: ModelPlan,
        make_group: Callable[[str], WorkerGroup],
        host: str,
        events: RankEvents,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._plan = plan
        self._make_group = make_group
        self._host = host
        self._events = events
        self._clock = clock
        self._restarts: deque[float] = deque()
        self._tasks: list[asyncio.Task[None]] = []
        self._balancer: ExpertBalancer | None = None
        self.group = make_group(new_epoch("ranks"))
        self.executor: AnyExecutor | None = None

    async def start(self) -> None:
        """Start the present set; raises as `WorkerGroup.start`."""
        link = await self.group.start(self._host, self._events.on_progress)
        self.executor = make_executor(self._plan, link)
        self._tasks = [asyncio.create_task(self._watch())]
        self._balancer = make_balancer(self._plan, self.group.facts, self.group.nodes)
        if self._plan.experts is not None and self._balancer is not None:
            self._choose = scheme_chooser(self.group.facts["schemes"], self._plan.tp_size)
            upkeep = self._upkeep(self._plan.experts, self._balancer)
            self._tasks.append(asyncio.create_task(upkeep.run()))

    async def replace(self, error: PenstockError) -> AnyExecutor | None:
        """Another set for one that has lost ranks; None when the plan's restarts are used up.

        Raises:
            PenstockError: the new ranks could not be started.
        """
        now_s = self._clock()
        while self._restarts and now_s - self._restarts[0] > _HOUR_S:
            self._restarts.popleft()
        if len(self._restarts) >= self._plan.scheduler.max_rank_restarts:
            return None
        self._restarts.append(now_s)
        log.warning("all ranks are replaced, requests wait: %s", error)
        self._events.on_progress("replacing lost ranks", 0.0)
        self.stop()
        if self.executor is not None:
            await asyncio.to_thread(self.executor.close)
        self.group = self._make_group(new_epoch("ranks"))
        await self.start()
        log.warning("new ranks after %.1f s", self._clock() - now_s)
        return self.executor

    def stop(self) -> None:
        """Let the present set go; safe to call twice."""
        for task in self._tasks:
            task.cancel()
        self.group.kill()

    def choose_scheme(self, num_tokens: int) -> tuple[str, str]:
        """The exchange of a step, as the present ranks measured it; from the engine's thread."""
        return self._choose(num_tokens)

    def expert_orders(self) -> ExpertOrders:
        """What the next step says of experts; from the engine's thread."""
        return self._balancer.orders() if self._balancer is not None else ExpertOrders()

    async def _watch(self) -> None:
        error = await self.group.wait_failure()
        if self._plan.experts is not None:
            # The other ranks are about to tell in which layer they miss it, which is worth more.
            await asyncio.sleep(_ACCOUNT_S)
        self._events.on_lost(error)

    def _upkeep(self, plan: ExpertPlan, balancer: ExpertBalancer) -> ExpertUpkeep:
        return ExpertUpkeep(
            ask_ranks=self.group.expert_states,
            newest_step=self._events.newest_step,
            watch=ExpertWatch(tuple(balancer.tables.values())),
            balancer=balancer,
            interval_s=plan.balance_interval_s,
            report=self._events.on_experts,
        )
