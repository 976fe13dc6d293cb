"""Everything that begins and ends with one set of ranks, and the change from one set to the next.

The engine outlives its ranks. When some are lost, those that are left go on under an epoch of their
own, where the plan allows it and they can hold all experts, and others take the lost ones' seats
while they serve (`expert_side.py`). Else, as often as the plan allows, all ranks are replaced. In
both cases the engine's requests go on with the tokens they have.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.base.errors import PenstockError, WorkerDiedError
from cluster.base.ids import new_epoch
from cluster.base.plan import ModelPlan
from replicas.engine.engine_loop import Recovery
from replicas.engine.lockstep import ExpertOrders
from replicas.leader.engine_parts import AnyExecutor, make_executor
from replicas.leader.expert_side import ExpertSide
from replicas.leader.rank_actors import OnProgress
from replicas.leader.record import ExpertRecord, LossRecord
from replicas.leader.worker_group import WorkerGroup
from replicas.worker.leader_link import LeaderLink

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
    on_loss: Callable[[LossRecord | None], None]
    """The replica serves without some ranks; None: all are there again."""
    on_newcomers: Callable[[], None]
    """Ranks wait to be taken in between two steps, see `RankSide.take_in`."""
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
        self._watching: asyncio.Task[None] | None = None
        self._experts: ExpertSide | None = None
        self.group = make_group(new_epoch("ranks"))
        self.executor: AnyExecutor | None = None

    @property
    def can_lose_ranks(self) -> bool:
        """Whether the plan has the engine go on when ranks are lost, in one way or the other."""
        survives = self._plan.experts is not None and self._plan.experts.survives
        return survives or self._plan.scheduler.max_rank_restarts > 0

    async def start(self) -> None:
        """Start the present set; raises as `WorkerGroup.start`."""
        link = await self.group.start(self._host, self._events.on_progress)
        if self._plan.experts is not None:
            self._experts = ExpertSide(self._plan, self.group, link, self._events)
            self._experts.serve()
        self._use(link)

    async def recover(self, error: PenstockError) -> Recovery | None:
        """Ranks to go on with after a loss; None when there are to be none.

        Raises:
            PenstockError: the survivors cannot go on and all ranks are not, or could not be,
                replaced; says why and what would help.
        """
        self._stop_watching()
        refusal = None
        if self._experts is not None and self._experts.survives:
            try:
                link = await self._experts.shrink(error)
            except PenstockError as why:
                refusal = why
                log.warning("the ranks that are left cannot go on: %s", why)
            else:
                self._use(link)
                return Recovery(executor=self._present, keeps_cache=True)
        if not self._may_restart():
            if refusal is None:
                return None
            raise WorkerDiedError(
                f"{error.cause} The other ranks cannot go on: {refusal.cause}", refusal.remedy
            )
        await self._restart(error)
        return Recovery(executor=self._present)

    async def take_in(self) -> AnyExecutor:
        """Have newcomers and the others meet; no step is in flight.

        Raises:
            WorkerDiedError: they did not; the present group has ended.
        """
        if self._experts is None:
            raise WorkerDiedError("Only ranks of an expert-parallel replica join later.")
        self._stop_watching()
        try:
            link = await self._experts.grow()
        except PenstockError as error:
            raise WorkerDiedError(f"Ranks could not be taken in: {error.cause}") from error
        self._use(link)
        return self._present

    def stop(self) -> None:
        """Let the present set go; safe to call twice."""
        self._stop_watching()
        if self._experts is not None:
            self._experts.stop()
        self.group.kill()

    def groups(self) -> Sequence[int]:
        """Data-parallel groups that have ranks."""
        return self._experts.roster.groups if self._experts is not None else (0,)

    def choose_scheme(self, num_tokens: int) -> tuple[str, str]:
        """The exchange of a step, as the present ranks measured it; from the engine's thread."""
        if self._experts is None:
            raise WorkerDiedError("Only ranks of an expert-parallel replica exchange rows.")
        return self._experts.choose_scheme(num_tokens)

    def expert_orders(self) -> ExpertOrders:
        """What the next step says of experts; from the engine's thread."""
        return self._experts.balancer.orders() if self._experts is not None else ExpertOrders()

    @property
    def _present(self) -> AnyExecutor:
        if self.executor is None:
            raise WorkerDiedError("No ranks have been started.")
        return self.executor

    def _use(self, link: LeaderLink) -> None:
        self.executor = make_executor(self._plan, link)
        self._watching = asyncio.create_task(self._watch())

    def _may_restart(self) -> bool:
        """Whether all ranks may be replaced once more; counts it."""
        now_s = self._clock()
        while self._restarts and now_s - self._restarts[0] > _HOUR_S:
            self._restarts.popleft()
        if len(self._restarts) >= self._plan.scheduler.max_rank_restarts:
            return False
        self._restarts.append(now_s)
        return True

    async def _restart(self, error: PenstockError) -> None:
        """Another set for one that has lost ranks; raises as `WorkerGroup.start`."""
        begun_s = self._clock()
        log.warning("all ranks are replaced, requests wait: %s", error)
        self._events.on_progress("replacing lost ranks", 0.0)
        self.stop()
        if self.executor is not None:
            await asyncio.to_thread(self.executor.close)
        self.group = self._make_group(new_epoch("ranks"))
        await self.start()
        self._events.on_loss(None)
        log.warning("new ranks after %.1f s", self._clock() - begun_s)

    def _stop_watching(self) -> None:
        if self._watching is not None:
            self._watching.cancel()

    async def _watch(self) -> None:
        error = await self.group.actors.wait_failure()
        if self._plan.experts is not None:
            # The other ranks are about to tell in which layer they miss it, which is worth more.
            await asyncio.sleep(_ACCOUNT_S)
        self._events.on_lost(error)
