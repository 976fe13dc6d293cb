"""Bring a plan up on Ray, watch it become ready, take it down: nothing is left behind.

Owns the runtime, the directory actor and the Serve applications of one cluster. Progress comes
as `Snapshot`s for whoever displays it; failure of a replica surfaces with its root cause.
"""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.schema import ApplicationStatus

from cluster.base import names
from cluster.base.errors import (
    ConfigError,
    CorruptWeightsError,
    DeviceOutOfMemoryError,
    InternalError,
    PenstockError,
    UnavailableError,
    UserError,
    error_from_dict,
)
from cluster.base.plan import ClusterPlan, from_json
from cluster.control import deployments
from cluster.control.directory_actor import DirectoryActor
from cluster.control.ray_runtime import RayRuntime
from cluster.control.room import check_room
from replicas.leader.record import ReplicaRecord, ReplicaState

_CALL_TIMEOUT_S = 10.0
_POLL_S = 0.1
_SERVE_POLL_S = 1.0
_HOPELESS = (UserError, CorruptWeightsError, DeviceOutOfMemoryError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Where start-up stands."""

    replicas: tuple[ReplicaRecord, ...]
    gateway_ready: bool
    """Whether the gateway reaches a replica of every model."""
    waiting_for: str
    """What Ray still has to place or start; empty when everything is in place."""


class ClusterRun:
    """One cluster, from `start` to `stop`."""

    def __init__(self, plan: ClusterPlan, runtime: RayRuntime) -> None:
        self.plan = plan
        self.runtime = runtime
        self._directory: Any = None
        self._serve_due_s = 0.0
        self._waiting_for = ""
        self._models_by_app = {
            names.engine_app(plan.name, model.name): model.name for model in plan.models
        }
        self._apps = [names.gateway_app(plan.name), *self._models_by_app]

    def start(self) -> None:
        """Create the directory and deploy every application; returns before they are ready.

        Raises:
            ConfigError: a cluster of this name already runs in this Ray runtime.
            UnavailableError: others have reserved the memory that the models need.
        """
        name = names.directory_actor(self.plan.name)
        with suppress(ValueError):
            ray.get_actor(name, namespace=names.NAMESPACE)
            raise ConfigError(
                f"A cluster named {self.plan.name!r} already runs in this Ray runtime.",
                "Give this one another cluster.name, or take that one down.",
                param="cluster.name",
            )
        if not self.runtime.owned:
            check_room(self.plan)
        self._directory = (
            ray.remote(DirectoryActor)
            .options(
                name=name,
                namespace=names.NAMESPACE,
                num_cpus=0,
                max_restarts=-1,
                max_concurrency=1000,
                lifetime="detached",
            )
            .remote()
        )
        serve.start(proxy_location="Disabled")
        host = "127.0.0.1" if self.runtime.owned else ""
        engines = [
            deployments.engine_target(self.plan.name, model, host) for model in self.plan.models
        ]
        gateway = deployments.gateway_target(self.plan, self.runtime)
        serve.run_many([*engines, gateway], wait_for_applications_running=False)

    def wait_ready(self, timeout_s: float, on_progress: Callable[[Snapshot], None]) -> None:
        """Wait until every replica and gateway answers.

        Raises:
            PenstockError: the root cause, when a replica cannot start.
            UnavailableError: not ready within `timeout_s` seconds; says what is missing.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            snapshot = self.snapshot()
            on_progress(snapshot)
            if self._is_ready(snapshot):
                return
            self._raise_failure(snapshot)
            self._check_serve(snapshot)
            if time.monotonic() > deadline_s:
                raise UnavailableError(
                    f"The cluster is not ready after {timeout_s:.0f} s: {_missing(snapshot)}.",
                    "Look at the actors in the Ray dashboard, or raise --timeout.",
                )
            time.sleep(_POLL_S)

    def snapshot(self) -> Snapshot:
        """The state of every replica, as the directory and Serve see it."""
        _, records = ray.get(self._directory.snapshot.remote(), timeout=_CALL_TIMEOUT_S)
        replicas = tuple(from_json(ReplicaRecord, record) for record in records)
        gateway = self.plan.gateway
        return Snapshot(
            replicas=replicas,
            gateway_ready=_is_ready(
                f"http://{names.authority(gateway.host, gateway.http_port)}/readyz"
            ),
            waiting_for=self._waiting_for,
        )

    def stop(self) -> None:
        """Take everything of this cluster down; best effort in each step, complete in sum."""
        with suppress(RayError, RuntimeError, TimeoutError):
            for app in self._apps:
                serve.delete(app, _blocking=False)
        if self._directory is not None:
            with suppress(RayError, RuntimeError):
                ray.kill(self._directory)
        if not self.runtime.owned:
            self._wait_deleted()

    def _is_ready(self, snapshot: Snapshot) -> bool:
        ready = [record for record in snapshot.replicas if record.state is ReplicaState.READY]
        enough = all(
            sum(record.model == model.name for record in ready) >= model.replicas
            for model in self.plan.models
        )
        return enough and snapshot.gateway_ready

    def _raise_failure(self, snapshot: Snapshot, model: str | None = None) -> None:
        """Give up at once on what a restart cannot mend; on anything once Serve has given up.

        Args:
            model: the model whose application Serve gave up, if it did.
        """
        for record in snapshot.replicas:
            if record.error is not None:
                error = error_from_dict(record.error)
                if record.model == model or isinstance(error, _HOPELESS):
                    raise _with_model(error, record.model)

    def _check_serve(self, snapshot: Snapshot) -> None:
        """Ask Serve, at most once a second, what it waits for and whether it gave up."""
        if time.monotonic() < self._serve_due_s:
            return
        self._serve_due_s = time.monotonic() + _SERVE_POLL_S
        applications = serve.status().applications
        waiting = []
        for app in self._apps:
            status = applications.get(app)
            if status is None:
                continue
            if status.status == ApplicationStatus.DEPLOY_FAILED:
                self._raise_failure(snapshot, self._models_by_app.get(app))
                raise InternalError(
                    f"Ray Serve could not deploy {app}: {status.message.rstrip('.')}.",
                    "The log of its replica, in the Ray dashboard under Serve, says why.",
                )
            waiting += [item.message for item in status.deployments.values() if item.message]
        self._waiting_for = "; ".join(waiting)

    def _wait_deleted(self) -> None:
        deadline_s = time.monotonic() + 30.0
        while time.monotonic() < deadline_s:
            if not any(app in serve.status().applications for app in self._apps):
                return
            time.sleep(_POLL_S)


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1.0) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _missing(snapshot: Snapshot) -> str:
    states = [
        f"{record.model} is {record.state} ({record.detail})"
        for record in snapshot.replicas
        if record.state is not ReplicaState.READY
    ]
    if not snapshot.gateway_ready:
        states.append("the gateway does not answer")
    if not snapshot.replicas:
        states.insert(0, "no replica has reported")
    if snapshot.waiting_for:
        states.append(f"Ray Serve says: {snapshot.waiting_for}")
    return "; ".join(states)


def _with_model(error: PenstockError, model: str) -> PenstockError:
    fields = error.to_dict()
    fields["cause"] = f"Model {model!r} cannot start: {error.cause}"
    return error_from_dict(fields)
