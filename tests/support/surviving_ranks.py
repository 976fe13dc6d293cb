"""Rank processes that go on when some of them are lost, with the leader's side in this one."""

from __future__ import annotations

import time
from collections.abc import Sequence

from cluster.base.errors import PenstockError
from cluster.base.plan import ModelPlan
from cluster.dist.rendezvous import pick_port
from replicas.engine.engine_loop import Recovery
from replicas.leader.expert_balancer import ExpertBalancer
from replicas.leader.roster import Meeting, Muster, Roster
from replicas.leader.worker_plans import Meetings, worker_plan
from replicas.worker import roll_call
from replicas.worker.link_listener import LinkListener
from replicas.worker.lockstep_executor import LockstepExecutor
from tests.support.lockstep_ranks import HOST, LockstepRanks


class SurvivingRanks(LockstepRanks):
    """As `RankSide` does it, without Ray."""

    def __init__(self, plan: ModelPlan, nodes: Sequence[str] = ()) -> None:
        super().__init__(plan, nodes)
        self.roster = Roster(plan, self.nodes, tuple(self.balancer.tables.values()))
        self.num_gatherings = 0
        self.num_fetched = 0
        self.recovery_s: list[float] = []

    def serving(self) -> Sequence[int]:
        """Groups that have ranks."""
        return self.roster.groups

    def recover(self, error: PenstockError) -> Recovery | None:
        """For `EngineLoop`: those that are left go on."""
        started_s = time.monotonic()
        call = roll_call.halt(self.link, timeout_s=8.0)
        muster = self.roster.without(call.present, tuple(self.balancer.tables.values()))
        gone = set(self.link.ranks) - set(muster.members)
        self.link.drop(gone)
        for rank in gone:
            self.processes[rank].kill()
        self._gather(muster, forgets_rows=True)
        self.recovery_s.append(time.monotonic() - started_s)
        return Recovery(executor=self.executor, keeps_cache=True)

    def start_missing(self) -> None:
        """Begin processes for the ranks that are lost; returns when they are ready to join."""
        lost = self.roster.lost
        listener = LinkListener(
            size=self.plan.num_ranks,
            epoch="later",
            secret="s",
            host=HOST,
            nodes=self.nodes,
            ranks=lost,
        )
        meetings = Meetings(
            epoch="later",
            link=listener.address,
            secret="s",
            tensor_groups=((HOST, 0),) * self.plan.dp_size,
            peers=(HOST, 0),
            nodes=self.nodes,
        )
        for rank in lost:
            self.start(worker_plan(self.plan, rank, meetings, self.roster.whole().tables))
        self._newcomers = listener.accept_all(timeout_s=60)
        listener.close()

    def take_in(self) -> LockstepExecutor:
        """For `EngineLoop.widen`: newcomers and the others meet."""
        call = roll_call.halt(self.link, timeout_s=8.0)
        assert not call.absent
        self.link = self.link.merged(self._newcomers)
        self._gather(self.roster.whole(), forgets_rows=False)
        return self.executor

    def _gather(self, muster: Muster, *, forgets_rows: bool) -> None:
        self.num_gatherings += 1
        meeting = Meeting(
            epoch=f"e{self.num_gatherings}",
            peers=(HOST, pick_port(HOST)),
            tensor_groups={group: (HOST, pick_port(HOST)) for group in range(self.plan.dp_size)},
        )
        told = self.roster.gatherings(muster, meeting, forgets_rows=forgets_rows)
        answers = roll_call.gather(self.link, told, timeout_s=30.0)
        self.num_fetched += sum(answer.num_fetched for answer in answers.values())
        self.roster.adopt(muster)
        self.balancer = ExpertBalancer(muster.tables, self.roster.nodes_of(muster), max_moves=0)
        self.executor = LockstepExecutor(self.link, tp_size=self.plan.tp_size)
