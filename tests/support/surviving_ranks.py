"""Rank processes that go on when some of them are lost, with the leader's side in this one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Sequence

from cluster.base.errors import PenstockError
from cluster.base.plan import ModelPlan
from cluster.dist.rendezvous import pick_port
from replicas.engine.engine_loop import Recovery
from replicas.leader.engine_parts import scheme_chooser
from replicas.leader.link_knowledge import LinkKnowledge, ProbeDecision
from replicas.leader.roster import Meeting, Muster, Roster
from replicas.leader.worker_plans import Meetings, worker_plan
from replicas.worker import roll_call
from replicas.worker.gathering import Gathered
from replicas.worker.link_listener import LinkListener
from replicas.worker.lockstep_executor import LockstepExecutor
from tests.support.lockstep_ranks import HOST, LockstepRanks


class SurvivingRanks(LockstepRanks):
    """As `RankSide` does it, without Ray.

    Attributes:
        on_gather: called when the survivors have just been told to gather, with their number.
        kills: whether ranks that are lost are ended; else as where a node is cut off.
        noticed: when each loss was noticed, and as what.
        decisions: whether each gathering measured its links.
        gathered: what the members of the last gathering answered.
    """

    def __init__(self, plan: ModelPlan, nodes: Sequence[str] = ()) -> None:
        super().__init__(plan, nodes)
        self.roster = Roster(plan, self.nodes, tuple(self.balancer.tables.values()))
        self.num_gatherings = 0
        self.num_fetched = 0
        self.recovery_s: list[float] = []
        self.on_gather: Callable[[int], None] = lambda number: None
        self.kills = True
        self.noticed: list[tuple[float, PenstockError]] = []
        self.decisions: list[ProbeDecision] = []
        self.gathered: dict[int, Gathered] = {}
        assert plan.experts is not None
        self._links = LinkKnowledge(plan.experts.exchange, self.facts()[0]["costs"], self.nodes)

    def serving(self) -> Sequence[int]:
        """Groups that have ranks."""
        return self.roster.groups

    def recover(self, error: PenstockError) -> Recovery | None:
        """For `EngineLoop`: those that are left go on."""
        started_s = time.monotonic()
        tables = tuple(self.balancer.tables.values())
        for _ in range(self.plan.dp_size):
            self.noticed.append((time.monotonic(), error))
            call = roll_call.halt(self.link, 20.0, self.find_silent, tp_size=self.plan.tp_size)
            muster = self.roster.without(call.present, tables)
            gone = set(self.link.ranks) - set(muster.members)
            self.link.drop(gone)
            for rank in gone if self.kills else ():
                self.processes[rank].kill()
            try:
                self._gather(muster, forgets_rows=True)
            except PenstockError as another:
                error = another
                continue
            self.recovery_s.append(time.monotonic() - started_s)
            return Recovery(executor=self.executor, keeps_cache=True)
        raise error

    def find_silent(self, ranks: Collection[int], timeout_s: float) -> set[int]:
        """As `RankActors.silent`."""
        silent = set()
        with self._asking:
            for rank in ranks:
                with contextlib.suppress(OSError):  # its process has ended
                    self._questions[rank].send(True)
            deadline_s = time.monotonic() + timeout_s
            for rank in ranks:
                pipe = self._questions[rank]
                try:
                    if pipe.poll(max(0.0, deadline_s - time.monotonic())):
                        pipe.recv()
                        continue
                except (OSError, EOFError):
                    pass  # ended
                silent.add(rank)
        return silent

    def start_missing(self, nodes: Sequence[str] = ()) -> None:
        """Begin processes for the ranks that are lost; returns when they are ready to join.

        Args:
            nodes: where all ranks are then; none: where they were.
        """
        lost = sorted(self.roster.lost)
        self.nodes = tuple(nodes) or self.nodes
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
            self.start(worker_plan(self.plan, rank, meetings, self.roster.tables_by_rank()))
        self._newcomers = listener.accept_all(timeout_s=60)
        listener.close()

    def take_in(self) -> LockstepExecutor:
        """For `EngineLoop.widen`: newcomers and the others meet."""
        call = roll_call.halt(self.link, 8.0, self.find_silent, tp_size=self.plan.tp_size)
        assert not call.absent
        self.link = self.link.merged(self._newcomers)
        self.roster.seat(self.nodes)
        self._gather(self.roster.whole(), forgets_rows=False)
        return self.executor

    def _gather(self, muster: Muster, *, forgets_rows: bool) -> None:
        self.num_gatherings += 1
        nodes = self.roster.nodes_of(muster)
        balancer = self.balancer.regrouped(muster.tables, nodes)
        decision = self._links.decide(nodes)
        self.decisions.append(decision)
        meeting = Meeting(
            epoch=f"e{self.num_gatherings}",
            peers=(HOST, pick_port(HOST)),
            tensor_groups={group: (HOST, pick_port(HOST)) for group in range(self.plan.dp_size)},
            table=balancer.version,
            costs=self._links.costs,
            probes=decision.probes,
        )
        told = self.roster.gatherings(muster, meeting, forgets_rows=forgets_rows)
        self.on_gather(self.num_gatherings)
        answers = roll_call.gather(self.link, told, 30.0, self.find_silent)
        self._links.learn(decision, nodes, answers)
        self.gathered = answers
        schemes = answers[muster.members[0]].schemes
        self.choose_scheme = scheme_chooser(schemes, self.plan.tp_size)
        self.num_fetched += sum(answer.num_fetched for answer in answers.values())
        self.roster.adopt(muster)
        self.balancer = balancer
        self.executor = LockstepExecutor(self.link, tp_size=self.plan.tp_size)
