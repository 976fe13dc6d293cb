"""The leader replica: a Ray Serve deployment that owns one engine and its worker ranks.

It ties scheduler, engine loop, ranks and replica stream together and stays free of torch. It is
ready when its constructor returns. On the loss or hang of a rank those that are left go on, or all
are replaced, while requests wait, as the plan allows (`rank_side.py`); else all ranks are killed,
every request ends with the root cause and the process exits; Serve starts a new one. It never waits
for a collective to notice.
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
from cluster.base.interpreter import settle_for_serving
from cluster.base.log import log_under_ray
from cluster.base.plan import ModelPlan, from_json
from cluster.base.replica_version import replica_version
from replicas.api import GenerationDelta, ReplicaStats
from replicas.engine.engine_loop import Recovery
from replicas.leader.engine_parts import AnyExecutor, make_engine
from replicas.leader.expert_metrics import ExpertMetrics
from replicas.leader.load_metrics import LoadMetrics
from replicas.leader.rank_side import RankEvents, RankSide
from replicas.leader.record import ExpertRecord, LoadRecord, LossRecord, ReplicaRecord, ReplicaState
from replicas.leader.reporter import DirectoryReporter
from replicas.leader.stream_server import ReplicaStreamServer
from replicas.leader.worker_group import WorkerGroup
from replicas.worker.actor import WorkerActor

_LAST_WORDS_S = 0.25
_METRICS_PERIOD_S = 1.0
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
        log_under_ray()
        self._plan = from_json(ModelPlan, model)
        self._stats = ReplicaStats()
        self._dying = False
        self._drain_s = 0.0
        replica_id = serve.get_replica_context().replica_id.unique_id
        host = host or ray.util.get_node_ip_address()
        epoch = new_epoch("leader")
        self._reporter = DirectoryReporter(
            lambda: ray.get_actor(names.directory_actor(cluster), namespace=names.NAMESPACE),
            ReplicaRecord(
                replica_id=replica_id,
                model=self._plan.name,
                epoch=epoch,
                version=replica_version(self._plan),
                state=ReplicaState.STARTING,
                pid=os.getpid(),
                node=host,
            ),
            lambda: _load_record(self._stats),
        )
        self._metrics = LoadMetrics(self._plan.name, replica_id)
        self._expert_metrics = ExpertMetrics(self._plan.name, replica_id)
        self._ranks = RankSide(
            self._plan,
            lambda epoch: WorkerGroup(
                self._plan,
                cluster=cluster,
                replica_id=replica_id,
                epoch=epoch,
                worker_class=worker_class,
            ),
            host,
            RankEvents(
                on_progress=self._show_progress,
                on_lost=self._on_lost,
                on_experts=self._on_experts,
                on_loss=self._on_loss,
                on_newcomers=self._on_newcomers,
                newest_step=lambda: self._stats.step,
            ),
        )
        try:
            await self._start(host, epoch)
        except Exception as error:
            self._ranks.stop()
            await self._report_failure(error)
            raise

    async def _start(self, host: str, epoch: str) -> None:
        """Workers first, then the engine, then the door."""
        started_s = time.monotonic()
        self._asyncio_loop = asyncio.get_running_loop()
        await self._ranks.start()
        self._engine = make_engine(
            self._plan,
            self._ranks,
            on_deltas=self._on_deltas,
            on_fatal=self._on_fatal,
            recover=self._recover,
        )
        self._stats = self._engine.stats
        self._server = ReplicaStreamServer(self._engine, epoch=epoch)
        self._server.publish((), self._stats)
        port = await self._server.start(host)
        settle_for_serving()
        self._engine.start()
        self._exporter = asyncio.create_task(self._export_metrics())
        self._say_ready(
            endpoint=f"{host}:{port}",
            startup_s=self._ranks.group.startup_s
            | {"total": round(time.monotonic() - started_s, 3)},
        )

    def _say_ready(self, **changes: Any) -> None:
        self._reporter.update(
            state=ReplicaState.READY,
            detail="",
            progress=1.0,
            workers=self._ranks.group.records,
            **changes,
        )

    def reconfigure(self, settings: dict[str, float]) -> None:
        """Follow `drain_s`, the time to finish when it leaves; called after the constructor too."""
        self._drain_s = settings["drain_s"]

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
        await self._server.drain(self._drain_s)
        self._exporter.cancel()
        await self._asyncio_loop.run_in_executor(None, self._engine.stop)
        await self._server.stop()
        self._ranks.stop()
        await self._reporter.goodbye()

    async def _report_failure(self, error: Exception) -> None:
        """Leave the root cause where `penstock up` and Status find it, as the last word."""
        self._dying = True
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

    def _on_lost(self, error: PenstockError) -> None:
        """A rank has left its parked call. An engine that may go on hears it, asleep or not."""
        if self._ranks.can_lose_ranks:
            self._engine.lose_workers(error)
        else:
            self._die(error)

    def _recover(self, error: PenstockError) -> Recovery | None:
        """Engine thread: the loop waits for ranks to go on with."""
        if not self._ranks.can_lose_ranks or self._dying:
            return None
        recovering = asyncio.run_coroutine_threadsafe(
            self._ranks.recover(error), self._asyncio_loop
        )
        recovery = recovering.result()
        if recovery is not None:
            self._asyncio_loop.call_soon_threadsafe(self._say_ready)
        return recovery

    def _on_newcomers(self) -> None:
        """Ranks wait to join: between two steps they do."""
        self._engine.widen(self._take_in)

    def _take_in(self) -> AnyExecutor:
        """Engine thread, with no step in flight."""
        joining = asyncio.run_coroutine_threadsafe(self._ranks.take_in(), self._asyncio_loop)
        executor = joining.result()
        self._asyncio_loop.call_soon_threadsafe(self._say_ready)
        return executor

    async def _export_metrics(self) -> None:
        while True:
            await asyncio.sleep(_METRICS_PERIOD_S)
            self._metrics.flush(self._stats, self._engine.times)

    def _on_experts(self, record: ExpertRecord) -> None:
        self._expert_metrics.flush(record)
        self._reporter.update(experts=record)

    def _on_loss(self, loss: LossRecord | None) -> None:
        self._expert_metrics.flush_lost(len(loss.ranks) if loss is not None else 0)
        self._reporter.update(loss=loss, workers=self._ranks.group.records)

    def _die(self, error: PenstockError) -> None:
        """Leave so that Serve starts a new replica; the clients hear the cause first."""
        if self._dying:
            return
        self._dying = True
        self._ranks.stop()
        self._server.fail_all(error)
        self._reporter.update(state=ReplicaState.FAILED, detail=error.cause, error=error.to_dict())
        self._asyncio_loop.call_later(_LAST_WORDS_S, os._exit, 1)


def _load_record(stats: ReplicaStats) -> LoadRecord:
    return LoadRecord(**{name: getattr(stats, name) for name in LoadRecord.__slots__})
