"""The leader's worker actors: created in its placement group, loaded, watched, let go.

At the start it is all or nothing: a rank that cannot start takes the group with it. Later single
ranks may be lost and others take their seats. The handles are kept here, so Ray does not collect
the actors; they die with the leader.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayActorError

from cluster.base.errors import PenstockError
from cluster.base.ids import new_epoch
from cluster.base.plan import ModelPlan, to_json
from cluster.dist.rendezvous import pick_port
from moe.expert_table import ExpertTable
from replicas.leader.rank_seats import RankSeats
from replicas.leader.record import WorkerRecord
from replicas.leader.worker_calls import all_or_first_error, as_error, call, outcome
from replicas.leader.worker_plans import Meetings, Place, worker_plan
from replicas.worker.actor import WorkerActor
from replicas.worker.leader_link import LeaderLink
from replicas.worker.link_listener import LinkListener

_CREATE_TIMEOUT_S = 120.0
_LOAD_TIMEOUT_S = 3600.0
_CONNECT_TIMEOUT_S = 30.0
_POLL_S = 0.2
_STATE_TIMEOUT_S = 5.0
_PORT_TIMEOUT_S = 5.0

OnProgress = Callable[[str, float], None]


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
        self._actors: dict[int, Any] = {}
        self._parked: dict[int, Any] = {}
        self._names: dict[int, str] = {}
        self._records: dict[int, WorkerRecord] = {}
        self._hosts: list[str] = []
        self._listens_on: str | None = None
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
        leader_node, ranks = self._seats.leader_node, range(self._plan.num_ranks)
        self._create(ranks, self._epoch)
        await self._call(0, "progress", "starting worker processes", _CREATE_TIMEOUT_S)
        self.startup_s["worker_processes"] = round(time.monotonic() - started_s, 3)
        self.nodes = nodes = self._seats.nodes
        self._listens_on = None if set(nodes) == {leader_node} else host
        # A rank on the leader's node listens where the leader does, others on their own.
        self._hosts = [host if node == leader_node else "" for node in nodes]
        listener = self._listener(ranks, self._epoch)
        try:
            meetings = await self._meetings(listener, host)
            link, infos = await self._load(ranks, listener, meetings, on_progress)
        finally:
            listener.close()
        self.startup_s |= infos[0]["startup_s"]
        self.facts = infos[0]["facts"]
        self._park(ranks)
        return link

    async def add(self, ranks: Sequence[int], tables: Sequence[ExpertTable]) -> LeaderLink:
        """Load others into the seats of lost ranks; they wait on the link for a gathering.

        Args:
            tables: where the experts will be, by rank.

        Raises:
            PenstockError: the root cause; none of them is left.
        """
        epoch = new_epoch("ranks")
        listener = self._listener(ranks, epoch)
        try:
            self._create(ranks, epoch)
            await all_or_first_error(
                [self._call(rank, "progress", "starting", _CREATE_TIMEOUT_S) for rank in ranks]
            )
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
            listener.close()
        self._park(ranks)
        return link

    def lose(self, ranks: Iterable[int]) -> None:
        """End these ranks now, stopped ones too; others stay."""
        for rank in ranks:
            self._parked.pop(rank, None)
            self._records.pop(rank, None)
            actor = self._actors.pop(rank, None)
            if actor is not None:
                with suppress(Exception):  # already dead, or Ray itself is going down
                    ray.kill(actor)

    def kill(self) -> None:
        """End every rank now; safe to call twice."""
        self.lose(tuple(self._actors))

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks there are, those that load among them."""
        return tuple(self._actors)

    async def places(self, ranks: Sequence[int], timeout_s: float = _PORT_TIMEOUT_S) -> list[Place]:
        """An address of each rank's machine and a port free there.

        Args:
            timeout_s: for an answer; processes that are still starting need long.

        Raises:
            PenstockError: a rank is gone or does not answer.
        """
        return [
            (str(host), int(port))
            for host, port in await all_or_first_error(
                [
                    self._call(rank, "pick_port", "choosing a port", timeout_s, host)
                    for rank, host in ((rank, self._hosts[rank]) for rank in ranks)
                ]
            )
        ]

    async def wait_failure(self) -> PenstockError:
        """Return when a rank leaves its parked call; says which and why."""
        ranks = tuple(self._parked)
        calls = [asyncio.ensure_future(outcome(self._parked[rank])) for rank in ranks]
        try:
            await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in calls:
                each.cancel()
        index = next(i for i, each in enumerate(calls) if each.done() and not each.cancelled())
        return as_error(calls[index].result(), ranks[index])

    async def expert_states(self, ranks: Sequence[int]) -> list[dict[str, Any]]:
        """What these ranks of an expert-parallel replica know of their experts.

        Raises:
            PenstockError: a rank is gone or does not answer.
        """
        here = [rank for rank in ranks if rank in self._actors]
        return await all_or_first_error(
            [self._call(rank, "expert_state", "counting rows", _STATE_TIMEOUT_S) for rank in here]
        )

    def _create(self, ranks: Iterable[int], epoch: str) -> None:
        for rank in ranks:
            self._actors[rank] = self._seats.create(rank, epoch)
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
        peers, *tensor_groups = await self.places(ranks, _CREATE_TIMEOUT_S)
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
            self._call(rank, "load", "loading weights", _LOAD_TIMEOUT_S, plan)
            for rank, plan in zip(ranks, plans, strict=True)
        ]
        accepting = asyncio.get_running_loop().run_in_executor(
            None, listener.accept_all, _LOAD_TIMEOUT_S
        )
        watching = asyncio.ensure_future(self._watch_progress(ranks, on_progress))
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

    def _park(self, ranks: Iterable[int]) -> None:
        for rank in ranks:
            self._parked[rank] = self._actors[rank].run.remote()

    async def _watch_progress(self, ranks: Sequence[int], on_progress: OnProgress) -> None:
        while True:
            await asyncio.sleep(_POLL_S)
            with suppress(RayActorError, TimeoutError, KeyError):
                calls = [
                    asyncio.wait_for(self._actors[rank].progress.remote(), 5.0) for rank in ranks
                ]
                states = await asyncio.gather(*calls)
                phase, fraction = min(states, key=lambda state: state[1])
                on_progress(phase, fraction)

    async def _call(
        self, rank: int, method: str, doing: str, timeout_s: float, *arguments: Any
    ) -> Any:
        ref = getattr(self._actors[rank], method).remote(*arguments)
        return await call(ref, timeout_s, doing, rank)


def _unheard(phase: str, fraction: float) -> None:
    """The replica serves: nobody asks how far its newcomers are."""
