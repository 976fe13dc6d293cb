"""The leader replica: a Ray Serve deployment that owns one engine and its worker ranks.

It ties scheduler, engine loop, step link, worker group and replica stream together and stays free
of torch. It is ready when its constructor returns. On the loss or hang of any rank every
request ends with the root cause, the ranks are killed and the process exits; Serve starts a new
one. It never waits for a collective to notice.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import ray
from ray import serve

from cluster.base import names
from cluster.base.errors import CollectiveTimeoutError, InternalError, PenstockError
from cluster.base.ids import new_epoch
from cluster.base.plan import ExpertPlan, ModelPlan, from_json
from replicas.api import GenerationDelta, ReplicaStats
from replicas.engine.lockstep import ExpertOrders
from replicas.leader.engine_parts import make_balancer, make_engine
from replicas.leader.expert_balancer import ExpertBalancer
from replicas.leader.expert_metrics import ExpertMetrics
from replicas.leader.expert_upkeep import ExpertUpkeep
from replicas.leader.expert_watch import ExpertWatch
from replicas.leader.load_metrics import LoadMetrics
from replicas.leader.record import ExpertRecord, LoadRecord, ReplicaRecord, ReplicaState
from replicas.leader.reporter import DirectoryReporter
from replicas.leader.stream_server import ReplicaStreamServer
from replicas.leader.worker_group import WorkerGroup
from replicas.worker.actor import WorkerActor

_LAST_WORDS_S = 0.25
_DRAIN_S = 4.0
_METRICS_PERIOD_S = 1.0
_ACCOUNT_S = 1.5
# The loop's own deadline fires first; this one is for a loop that is itself stuck.
_HANG_MARGIN_S = 5.0


class LeaderReplica:
    """One replica of one model.

    Args:
        model: JSON of the `ModelPlan`.
        cluster: the cluster's name, under which the directory is found.
        host: address to listen on; empty for this node's own.
        worker_class: the actor of each rank; what tells kinds of replica apart.
    """

    # Ray Serve awaits an async constructor; the replica is ready when it has returned.
    async def __init__(  # type: ignore[misc]
        self,
        model: dict[str, Any],
        cluster: str,
        host: str,
        worker_class: type[WorkerActor] = WorkerActor,
    ) -> None:
        self._plan = from_json(ModelPlan, model)
        self._stats = ReplicaStats()
        self._dying = False
        replica_id = serve.get_replica_context().replica_id.unique_id
        self._replica_id = replica_id
        host = host or ray.util.get_node_ip_address()
        epoch = new_epoch("leader")
        self._reporter = DirectoryReporter(
            lambda: ray.get_actor(names.directory_actor(cluster), namespace=names.NAMESPACE),
            ReplicaRecord(
                replica_id=replica_id,
                model=self._plan.name,
                epoch=epoch,
                state=ReplicaState.STARTING,
                pid=os.getpid(),
                node=host,
            ),
            lambda: _load_record(self._stats),
        )
        self._metrics = LoadMetrics(self._plan.name, replica_id)
        self._group = WorkerGroup(
            self._plan,
            cluster=cluster,
            replica_id=replica_id,
            epoch=epoch,
            worker_class=worker_class,
        )
        try:
            await self._start(host, epoch)
        except Exception as error:
            self._group.kill()
            await self._report_failure(error)
            raise

    async def _start(self, host: str, epoch: str) -> None:
        """Workers first, then the engine, then the door."""
        started_s = time.monotonic()
        self._asyncio_loop = asyncio.get_running_loop()
        link = await self._group.start(host, self._show_progress)
        balancer = make_balancer(self._plan, self._group.facts, self._group.nodes)
        self._engine = make_engine(
            self._plan,
            link,
            self._group.facts,
            expert_orders=balancer.orders if balancer else ExpertOrders,
            on_deltas=self._on_deltas,
            on_fatal=self._on_fatal,
        )
        self._stats = self._engine.stats
        self._server = ReplicaStreamServer(self._engine, epoch=epoch)
        self._server.publish((), self._stats)
        port = await self._server.start(host)
        self._engine.start()
        self._watcher = asyncio.create_task(self._watch_workers())
        self._background = [asyncio.create_task(self._export_metrics())]
        if self._plan.experts is not None and balancer is not None:
            upkeep = self._look_after_experts(self._plan.experts, balancer)
            self._background.append(asyncio.create_task(upkeep.run()))
        self._reporter.update(
            state=ReplicaState.READY,
            detail="",
            progress=1.0,
            endpoint=f"{host}:{port}",
            workers=self._group.records,
            startup_s=self._group.startup_s | {"total": round(time.monotonic() - started_s, 3)},
        )

    def check_health(self) -> None:
        """Serve's periodic check; progress, not presence.

        Raises:
            CollectiveTimeoutError: a step has been in flight far beyond its deadline.
            PenstockError: what ended the engine.
        """
        health = self._engine.health
        if health.fatal is not None:
            raise health.fatal
        limit_s = self._plan.scheduler.step_timeout_s + _HANG_MARGIN_S
        if health.step_started_s is not None:
            age_s = time.monotonic() - health.step_started_s
            if age_s > limit_s:
                raise CollectiveTimeoutError(f"The engine has been in one step for {age_s:.0f} s.")

    async def __del__(self) -> None:
        """Serve is taking this replica down: drain, say goodbye, let the ranks go."""
        if self._dying:
            return
        self._dying = True
        self._reporter.update(state=ReplicaState.DRAINING)
        await self._server.drain(_DRAIN_S)
        self._watcher.cancel()
        for task in self._background:
            task.cancel()
        await self._asyncio_loop.run_in_executor(None, self._engine.stop)
        await self._server.stop()
        self._group.kill()
        await self._reporter.goodbye()

    async def _report_failure(self, error: Exception) -> None:
        """Leave the root cause where `penstock up` and Status find it."""
        coded = error if isinstance(error, PenstockError) else InternalError(f"{error!r}")
        self._reporter.update(state=ReplicaState.FAILED, detail=coded.cause, error=coded.to_dict())
        await self._reporter.flush()

    def _show_progress(self, phase: str, fraction: float) -> None:
        self._reporter.update(detail=phase, progress=fraction)

    def _on_deltas(self, deltas: list[GenerationDelta], stats: ReplicaStats) -> None:
        """Engine thread: one hand-over per step."""
        self._stats = stats
        self._server.publish(deltas, stats)

    def _on_fatal(self, error: PenstockError) -> None:
        """Engine thread: the loop has ended every request and is over."""
        self._asyncio_loop.call_soon_threadsafe(self._die, error)

    async def _watch_workers(self) -> None:
        error = await self._group.wait_failure()
        if self._plan.experts is not None:
            # The other ranks are about to tell in which layer they miss it, which is worth more.
            await asyncio.sleep(_ACCOUNT_S)
        self._die(error)

    async def _export_metrics(self) -> None:
        while True:
            await asyncio.sleep(_METRICS_PERIOD_S)
            self._metrics.flush(self._stats, self._engine.times)

    def _look_after_experts(self, plan: ExpertPlan, balancer: ExpertBalancer) -> ExpertUpkeep:
        metrics = ExpertMetrics(self._plan.name, self._replica_id)

        def report(record: ExpertRecord) -> None:
            metrics.flush(record)
            self._reporter.update(experts=record)

        return ExpertUpkeep(
            ask_ranks=self._group.expert_states,
            newest_step=lambda: self._stats.step,
            watch=ExpertWatch(tuple(balancer.tables.values())),
            balancer=balancer,
            interval_s=plan.balance_interval_s,
            report=report,
        )

    def _die(self, error: PenstockError) -> None:
        """Leave so that Serve starts a new replica; the clients hear the cause first."""
        if self._dying:
            return
        self._dying = True
        self._group.kill()
        self._server.fail_all(error)
        self._reporter.update(state=ReplicaState.FAILED, detail=error.cause, error=error.to_dict())
        self._asyncio_loop.call_later(_LAST_WORDS_S, os._exit, 1)


def _load_record(stats: ReplicaStats) -> LoadRecord:
    return LoadRecord(**{name: getattr(stats, name) for name in LoadRecord.__slots__})
