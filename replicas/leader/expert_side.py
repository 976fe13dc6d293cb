"""Who of an expert-parallel replica's ranks serves, with which experts, and what becomes of losses.

    all ranks ──loss──▶ shrink: halt, those that are left gather ──▶ serving without some
        ▲                                                                  │ others load beside it
        └────────── grow, between two steps: halt, all gather ◀────────────┘

A loss during any of it ends that attempt and begins with a new roll call (`roll_caller.py`). On
the leader's asyncio loop, but for `choose_scheme`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from cluster.base.errors import InternalError, PenstockError, UnavailableError
from cluster.base.plan import ExpertPlan, ModelPlan
from replicas.leader.engine_parts import make_balancer, scheme_chooser
from replicas.leader.expert_upkeep import ExpertUpkeep
from replicas.leader.expert_watch import ExpertWatch
from replicas.leader.record import LossRecord
from replicas.leader.roll_caller import RollCaller
from replicas.leader.roster import Muster, Roster
from replicas.leader.worker_group import WorkerGroup
from replicas.worker.leader_link import LeaderLink

if TYPE_CHECKING:
    from replicas.leader.rank_side import RankEvents

log = logging.getLogger(__name__)

_FIRST_RETRY_S = 5.0
_LAST_RETRY_S = 600.0


class ExpertSide:
    """Who serves in an expert-parallel replica.

    Args:
        group: started ranks.
        link: to all of them.
    """

    def __init__(
        self, plan: ModelPlan, group: WorkerGroup, link: LeaderLink, events: RankEvents
    ) -> None:
        balancer = make_balancer(plan, group.facts, group.nodes)
        if plan.experts is None or balancer is None:
            raise InternalError("These ranks do not share experts.")
        self._plan = plan
        self._experts: ExpertPlan = plan.experts
        self._group = group
        self._events = events
        self._upkeep: asyncio.Task[None] | None = None
        self._rejoining: asyncio.Task[None] | None = None
        self._newcomers: LeaderLink | None = None
        self.choose_scheme: Callable[[int], tuple[str, str]] = scheme_chooser(
            group.facts["schemes"], plan.tp_size
        )
        self.balancer = balancer
        self.roster = Roster(plan, group.nodes, tuple(balancer.tables.values()))
        self._caller = RollCaller(plan, group, link, self.roster)
        self._watch = ExpertWatch(tuple(balancer.tables.values()))

    @property
    def survives(self) -> bool:
        """Whether the ranks wait for a new group when one of them is lost."""
        return self._experts.survives

    def serve(self) -> None:
        """Look after the experts of the present members, and after those who are missing."""
        upkeep = ExpertUpkeep(
            ask_ranks=lambda: self._group.actors.expert_states(self.roster.now.members),
            newest_step=self._events.newest_step,
            watch=self._watch,
            balancer=self.balancer,
            interval_s=self._experts.balance_interval_s,
            report=self._events.on_experts,
        )
        self._upkeep = asyncio.create_task(upkeep.run())
        if self.roster.lost and self._experts.rejoins:
            self._rejoining = asyncio.create_task(self._find_others())

    def stop(self) -> None:
        """Look after nothing any more; safe to call twice."""
        for task in (self._upkeep, self._rejoining):
            if task is not None:
                task.cancel()

    async def shrink(self, error: PenstockError) -> LeaderLink:
        """Go on with those that are left.

        Args:
            error: what was noticed.

        Raises:
            UnavailableError: they cannot hold all experts, or no group is whole.
            PenstockError: they did not meet.
        """
        begun_s = time.monotonic()
        self.stop()
        self._newcomers = None
        tables = tuple(self.balancer.tables.values())
        for _ in range(self._plan.dp_size):
            call = await self._caller.halt()
            log.warning("halted: %s; ranks %s are left", error, list(call.present))
            muster = self.roster.without(call.present, tables)
            self._let_go(muster)
            try:
                num_fetched = await self._gather(muster, forgets_rows=True)
            except PenstockError as another:
                log.warning("another attempt to gather: %s", another)
                error = another
                continue
            self._report(error, num_fetched, time.monotonic() - begun_s)
            self.serve()
            return self._caller.link
        raise error

    async def grow(self) -> LeaderLink:
        """Take in the ranks that have loaded beside the others; no step is in flight.

        Raises:
            PenstockError: one of them is lost.
        """
        begun_s = time.monotonic()
        newcomers, self._newcomers = self._newcomers, None
        if newcomers is None:
            raise InternalError("Nobody waits to be taken in.")
        self.stop()
        call = await self._caller.halt()
        self._caller.link = self._caller.link.merged(newcomers)
        self.roster.seat(self._group.nodes)
        if call.absent:
            raise UnavailableError(f"Ranks {sorted(call.absent)} are lost.")
        num_fetched = await self._gather(self.roster.whole(), forgets_rows=False)
        log.warning(
            "all ranks serve again: a pause of %.2f s, %d expert(s) read",
            time.monotonic() - begun_s,
            num_fetched,
        )
        self._events.on_loss(None)
        self.serve()
        return self._caller.link

    async def _gather(self, muster: Muster, *, forgets_rows: bool) -> int:
        """Have a muster meet and serve; how many experts its ranks had to read for it."""
        balancer = self.balancer.regrouped(muster.tables, self.roster.nodes_of(muster))
        answers = await self._caller.gather(muster, balancer.version, forgets_rows=forgets_rows)
        self.roster.adopt(muster)
        self.balancer = balancer
        self.choose_scheme = scheme_chooser(answers[muster.members[0]].schemes, self._plan.tp_size)
        return sum(answer.num_fetched for answer in answers.values())

    def _let_go(self, muster: Muster) -> None:
        """End who is lost, its tensor-parallel peers, and who had not yet joined."""
        link = self._caller.link
        link.drop([rank for rank in link.ranks if rank not in muster.members])
        self._group.lose([rank for rank in self._group.actors.ranks if rank not in muster.members])

    def _report(self, error: PenstockError, num_fetched: int, pause_s: float) -> None:
        lost, groups = self.roster.lost, self.roster.groups
        log.warning(
            "ranks %s are lost, %d of %d groups go on after %.2f s, %d expert(s) read",
            list(lost),
            len(groups),
            self._plan.dp_size,
            pause_s,
            num_fetched,
        )
        if not lost:
            self._events.on_loss(None)
            return
        self._events.on_loss(
            LossRecord(
                ranks=lost,
                nodes=tuple(self._group.nodes[rank] for rank in lost),
                cause=error.cause,
                num_groups=len(groups),
                num_groups_whole=self._plan.dp_size,
            )
        )

    async def _find_others(self) -> None:
        """Load others into the lost ranks' seats, as often as it takes, ever more rarely."""
        pause_s = 0.0
        while True:
            await asyncio.sleep(pause_s)
            lost = self.roster.lost
            try:
                self._newcomers = await self._group.add(lost, self.roster.tables_by_rank())
            except Exception as error:
                pause_s = min(max(_FIRST_RETRY_S, 2 * pause_s), _LAST_RETRY_S)
                log.warning(
                    "ranks %s are still missing, tried again in %.0f s: %s",
                    list(lost),
                    pause_s,
                    error,
                )
                continue
            self._events.on_newcomers()
            return
