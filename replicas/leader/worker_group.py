"""The leader's worker actors: created in its placement group, loaded, watched, let go.

At the start it is all or nothing: a rank that cannot start takes the group with it. Later single
ranks may be lost and others take their seats.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

from cluster.base.ids import new_epoch
from cluster.base.plan import ModelPlan, to_json
from cluster.dist.rendezvous import pick_port
from moe.expert_table import ExpertTable
from replicas.leader.rank_actors import OnProgress, RankActors
from replicas.leader.rank_seats import RankSeats
from replicas.leader.record import WorkerRecord
from replicas.leader.worker_calls import all_or_first_error
from replicas.leader.worker_plans import Meetings, worker_plan
from replicas.worker.actor import WorkerActor
from replicas.worker.leader_link import LeaderLink
from replicas.worker.link_listener import LinkListener

_CREATE_TIMEOUT_S = 120.0
_LOAD_TIMEOUT_S = 3600.0
_CONNECT_TIMEOUT_S = 30.0


class WorkerGroup:
    """The ranks of one replica from one start to the next.

    Args:
        worker_class: the actor of each rank.
    """

    def __init__(
        self,
        plan: ModelPlan,
        *,
        cluster: str,
        replica_id: str,
        epoch: str,
        worker_class: type[WorkerActor] = WorkerActor,
    ) -> None:
        self._plan = plan
        self._worker_class = worker_class
        self._cluster, self._replica_id, self._epoch = cluster, replica_id, epoch
        self._names: dict[int, str] = {}
        self._records: dict[int, WorkerRecord] = {}
        self._listens_on: str | None = None
        self.actors = RankActors()
        """What the ranks can be asked."""
        self.nodes: tuple[str, ...] = ()
        """Node of each rank, once started."""
        self.startup_s: dict[str, float] = {}
        self.facts: dict[str, Any] = {}
        """What rank 0 found out while it loaded."""

    @property
    def records(self) -> tuple[WorkerRecord, ...]:
        """The ranks that have loaded and are not lost, ascending."""
        return tuple(self._records[rank] for rank in sorted(self._records))

    async def start(self, host: str, on_progress: OnProgress) -> LeaderLink:
        """Create and load every rank, then connect the step link.

        Raises:
            PenstockError: the root cause of the first rank that failed, or what took too long.
        """
        started_s = time.monotonic()
        on_progress("worker processes", 0.0)
        self._seats = RankSeats(self._plan, self._cluster, self._replica_id, self._worker_class)
        ranks = range(self._plan.num_ranks)
        self._create(ranks, self._epoch)
        await self.actors.call(0, "progress", "starting worker processes", _CREATE_TIMEOUT_S)
        self.startup_s["worker_processes"] = round(time.monotonic() - started_s, 3)
        self._host = host
        self._locate()
        listener = self._listener(ranks, self._epoch)
        try:
            meetings = await self._meetings(listener, host)
            link, infos = await self._load(ranks, listener, meetings, on_progress)
        finally:
            listener.close()
        self.startup_s |= infos[0]["startup_s"]
        self.facts = infos[0]["facts"]
        self.actors.park(ranks)
        return link

    async def add(self, ranks: Sequence[int], tables: Sequence[ExpertTable]) -> LeaderLink:
        """Load others into the seats of lost ranks; they wait on the link for a gathering.

        Args:
            tables: where the experts will be, by rank.

        Raises:
            PenstockError: the root cause; none of them is left.
        """
        epoch = new_epoch("ranks")
        listener: LinkListener | None = None
        try:
            self._create(ranks, epoch)
            await all_or_first_error(
                [
                    self.actors.call(rank, "progress", "starting", _CREATE_TIMEOUT_S)
                    for rank in ranks
                ]
            )
            # Only now Ray has surely decided where: with a node its bundles move to others.
            self._seats.look_again(ranks)
            self._locate()
            listener = self._listener(ranks, epoch)
            nowhere = ("", 0)
            meetings = Meetings(
                epoch=epoch,
                link=listener.address,
                secret=listener.secret,
                tensor_groups=(nowhere,) * self._plan.dp_size,
                peers=nowhere,
                nodes=self.nodes,
            )
            link, _ = await self._load(ranks, listener, meetings, _unheard, tables)
        except BaseException:
            self.lose(ranks)
            raise
        finally:
            if listener is not None:
                listener.close()
        self.actors.park(ranks)
        return link

    def lose(self, ranks: Collection[int]) -> None:
        """End these ranks now, stopped ones too; others stay."""
        for rank in ranks:
            self._records.pop(rank, None)
        self.actors.lose(ranks)

    def kill(self) -> None:
        """End every rank now; safe to call twice."""
        self.lose(self.actors.ranks)

    def _locate(self) -> None:
        """Take in where the seats are."""
        self.nodes, leader_node = self._seats.nodes, self._seats.leader_node
        self._listens_on = None if set(self.nodes) == {leader_node} else self._host
        # A rank on the leader's node listens where the leader does, others on their own.
        self.actors.hosts = {
            rank: self._host for rank, node in enumerate(self.nodes) if node == leader_node
        }

    def _create(self, ranks: Iterable[int], epoch: str) -> None:
        for rank in ranks:
            self.actors.add(rank, self._seats.create(rank, epoch))
            self._names[rank] = self._seats.name(rank, epoch)

    def _listener(self, ranks: Sequence[int], epoch: str) -> LinkListener:
        return LinkListener(
            size=self._plan.num_ranks,
            epoch=epoch,
            secret=secrets.token_hex(16),
            host=self._listens_on,
            nodes=self.nodes if self._plan.experts else (),
            ranks=ranks,
        )

    async def _meetings(self, listener: LinkListener, host: str) -> Meetings:
        """Where groups of ranks meet: on the node of the first of them."""
        alone = Meetings(
            epoch=self._epoch,
            link=listener.address,
            secret=listener.secret,
            tensor_groups=((host, pick_port(host)),),
        )
        if self._plan.experts is None:
            return alone
        ranks = [0, *range(0, self._plan.num_ranks, self._plan.tp_size)]
        peers, *tensor_groups = await self.actors.places(ranks, _CREATE_TIMEOUT_S)
        return replace(alone, tensor_groups=tuple(tensor_groups), peers=peers, nodes=self.nodes)

    async def _load(
        self,
        ranks: Sequence[int],
        listener: LinkListener,
        meetings: Meetings,
        on_progress: OnProgress,
        tables: Sequence[ExpertTable] = (),
    ) -> tuple[LeaderLink, list[dict[str, Any]]]:
        plans = [to_json(worker_plan(self._plan, rank, meetings, tables)) for rank in ranks]
        calls = [
            self.actors.call(rank, "load", "loading weights", _LOAD_TIMEOUT_S, plan)
            for rank, plan in zip(ranks, plans, strict=True)
        ]
        accepting = asyncio.get_running_loop().run_in_executor(
            None, listener.accept_all, _LOAD_TIMEOUT_S
        )
        watching = asyncio.ensure_future(self.actors.watch_progress(ranks, on_progress))
        try:
            infos = await all_or_first_error(calls)
        except BaseException:
            listener.close()
            raise
        finally:
            watching.cancel()
        link = await asyncio.wait_for(accepting, _CONNECT_TIMEOUT_S)
        for rank, info in zip(ranks, infos, strict=True):
            self._records[rank] = WorkerRecord(
                rank=rank,
                pid=info["pid"],
                node=info["node"],
                device=info["device"],
                actor_name=self._names[rank],
                group=rank // self._plan.tp_size,
            )
        return link, infos


def _unheard(phase: str, fraction: float) -> None:
    """The replica serves: nobody asks how far its newcomers are."""
