"""The leader's worker actors: created in its placement group, loaded, watched, killed together.

All or nothing: a rank that cannot start, dies or leaves its parked call takes the group with it.
The handles are kept here, so Ray does not collect the actors; they die with the leader.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util import get_current_placement_group, placement_group_table
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.base import names
from cluster.base.errors import (
    InternalError,
    PenstockError,
    UnavailableError,
    WorkerDiedError,
)
from cluster.base.plan import ModelPlan, to_json
from cluster.dist.rendezvous import pick_port
from replicas.leader.record import WorkerRecord
from replicas.leader.seating import Seat, seat_ranks
from replicas.leader.worker_plans import Meetings, worker_plan
from replicas.worker.actor import WorkerActor
from replicas.worker.leader_link import LeaderLink
from replicas.worker.link_listener import LinkListener

_CREATE_TIMEOUT_S = 120.0
_LOAD_TIMEOUT_S = 3600.0
_CONNECT_TIMEOUT_S = 30.0
_POLL_S = 0.2
_STATE_TIMEOUT_S = 5.0

OnProgress = Callable[[str, float], None]


class WorkerGroup:
    """The ranks of one replica in one epoch.

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
        self._epoch = epoch
        self._names = [
            names.worker_actor(cluster, plan.name, replica_id, epoch, rank)
            for rank in range(plan.num_ranks)
        ]
        self._actors: list[Any] = []
        self._parked: list[Any] = []
        self.records: tuple[WorkerRecord, ...] = ()
        self.nodes: tuple[str, ...] = ()
        """Node of each rank, once started."""
        self.startup_s: dict[str, float] = {}
        self.facts: dict[str, Any] = {}
        """What rank 0 found out while it loaded."""

    async def start(self, host: str, on_progress: OnProgress) -> LeaderLink:
        """Create and load every rank, then connect the step link.

        Raises:
            PenstockError: the root cause of the first rank that failed, or what took too long.
        """
        started_s = time.monotonic()
        on_progress("worker processes", 0.0)
        group = get_current_placement_group()
        if group is None:
            raise InternalError("A leader must run in a placement group with a bundle per rank.")
        leader_node, *_ = node_of_bundle = _nodes_of(group)
        seats = seat_ranks(self._plan, node_of_bundle)
        self._create(group, seats)
        await self._call(
            self._actors[0].progress.remote(), _CREATE_TIMEOUT_S, "starting worker processes"
        )
        self.startup_s["worker_processes"] = round(time.monotonic() - started_s, 3)
        self.nodes = nodes = tuple(seat.node for seat in seats)
        listener = LinkListener(
            size=self._plan.num_ranks,
            epoch=self._epoch,
            secret=secrets.token_hex(16),
            host=None if set(nodes) == {leader_node} else host,
            nodes=nodes if self._plan.experts else (),
        )
        try:
            # A rank on the leader's node listens where the leader does, others on their own.
            hosts = [host if node == leader_node else "" for node in nodes]
            meetings = await self._meetings(listener, host, hosts, nodes)
            link = await self._load(listener, meetings, on_progress)
        finally:
            listener.close()
        self._parked = [actor.run.remote() for actor in self._actors]
        return link

    async def wait_failure(self) -> PenstockError:
        """Return when a rank leaves its parked call; says which and why."""
        calls = [asyncio.ensure_future(_outcome(ref)) for ref in self._parked]
        try:
            await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for call in calls:
                call.cancel()
        rank = next(rank for rank, call in enumerate(calls) if call.done() and not call.cancelled())
        return _as_error(calls[rank].result(), rank)

    async def expert_states(self) -> list[dict[str, Any]]:
        """What each rank of an expert-parallel replica knows of its experts.

        Raises:
            PenstockError: a rank is gone or does not answer.
        """
        calls = [
            self._call(actor.expert_state.remote(), _STATE_TIMEOUT_S, "counting rows", rank)
            for rank, actor in enumerate(self._actors)
        ]
        return await _all_or_first_error(calls)

    def kill(self) -> None:
        """End every rank now; safe to call twice."""
        for actor in self._actors:
            with suppress(Exception):  # already dead, or Ray itself is going down
                ray.kill(actor)
        self._actors = []

    def _create(self, group: PlacementGroup, seats: Sequence[Seat]) -> None:
        for name, seat in zip(self._names, seats, strict=True):
            options = {
                "name": name,
                "namespace": names.NAMESPACE,
                "num_cpus": self._plan.cpus_per_rank,
                "num_gpus": self._plan.gpus_per_rank,
                "max_concurrency": 4,
                "scheduling_strategy": PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=seat.bundle
                ),
            }
            self._actors.append(ray.remote(self._worker_class).options(**options).remote())

    async def _meetings(
        self, listener: LinkListener, host: str, hosts: Sequence[str], nodes: tuple[str, ...]
    ) -> Meetings:
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
        peers, *tensor_groups = await _all_or_first_error(
            [
                self._call(
                    self._actors[rank].pick_port.remote(hosts[rank]),
                    _CREATE_TIMEOUT_S,
                    "choosing a port",
                    rank,
                )
                for rank in ranks
            ]
        )
        return replace(alone, tensor_groups=tuple(tensor_groups), peers=peers, nodes=nodes)

    async def _load(
        self, listener: LinkListener, meetings: Meetings, on_progress: OnProgress
    ) -> LeaderLink:
        calls = [
            self._call(
                actor.load.remote(to_json(worker_plan(self._plan, rank, meetings))),
                _LOAD_TIMEOUT_S,
                "loading weights",
                rank,
            )
            for rank, actor in enumerate(self._actors)
        ]
        accepting = asyncio.get_running_loop().run_in_executor(
            None, listener.accept_all, _LOAD_TIMEOUT_S
        )
        watching = asyncio.ensure_future(self._watch_progress(on_progress))
        try:
            infos = await _all_or_first_error(calls)
        except BaseException:
            listener.close()
            raise
        finally:
            watching.cancel()
        link = await asyncio.wait_for(accepting, _CONNECT_TIMEOUT_S)
        self.records = tuple(
            WorkerRecord(
                rank=rank,
                pid=info["pid"],
                node=info["node"],
                device=info["device"],
                actor_name=self._names[rank],
                group=rank // self._plan.tp_size,
            )
            for rank, info in enumerate(infos)
        )
        self.startup_s |= infos[0]["startup_s"]
        self.facts = infos[0]["facts"]
        return link

    async def _watch_progress(self, on_progress: OnProgress) -> None:
        while True:
            await asyncio.sleep(_POLL_S)
            with suppress(RayActorError, TimeoutError):
                calls = [asyncio.wait_for(actor.progress.remote(), 5.0) for actor in self._actors]
                states = await asyncio.gather(*calls)
                phase, fraction = min(states, key=lambda state: state[1])
                on_progress(phase, fraction)

    async def _call(self, ref: Any, timeout_s: float, doing: str, rank: int = 0) -> Any:
        try:
            return await asyncio.wait_for(ref, timeout_s)
        except TimeoutError:
            raise UnavailableError(
                f"Worker rank {rank} is not done with {doing} after {timeout_s:.0f} s.",
                "See its log in the Ray dashboard.",
            ) from None
        except (RayActorError, RayTaskError) as error:
            raise _as_error(error, rank) from error


def _nodes_of(group: PlacementGroup) -> list[str]:
    """The node of each bundle: its address, or address and id where nodes share one."""
    node_ids = placement_group_table(group)["bundles_to_node_id"]
    address_of = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    num_sharing = Counter(address_of.values())
    return [
        address_of[node_id]
        if num_sharing[address_of[node_id]] == 1
        else f"{address_of[node_id]}/{node_id[:8]}"
        for _, node_id in sorted(node_ids.items())
    ]


async def _all_or_first_error(calls: Sequence[Awaitable[Any]]) -> list[Any]:
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


async def _outcome(ref: Any) -> Exception | None:
    try:
        await ref
    except Exception as error:
        return error
    return None


def _as_error(error: BaseException | None, rank: int) -> PenstockError:
    """The root cause behind what Ray reports of a rank."""
    cause = getattr(error, "cause", None)
    for candidate in (cause, error):
        if isinstance(candidate, PenstockError):
            return candidate
    if isinstance(error, RayTaskError):
        return InternalError(f"Worker rank {rank} failed: {cause or error}.")
    return WorkerDiedError(
        f"Worker rank {rank} died.",
        "The replica restarts by itself; retry the request.",
    )
