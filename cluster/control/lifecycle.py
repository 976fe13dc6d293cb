"""Bring a plan up on Ray, watch it become ready, take it down: nothing is left behind.

Owns the runtime, the directory actor and the Serve applications of one cluster. Progress comes
as `Snapshot`s for whoever displays it; failure of a replica surfaces with its root cause. How it
gets from one plan to another is in `rollout.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.schema import ApplicationStatus

from cluster.base import names
from cluster.base.errors import ConfigError, InternalError, UnavailableError
from cluster.base.plan import ClusterPlan, ModelPlan, from_json
from cluster.control import deployments, own_gateway, readiness
from cluster.control.directory_actor import start_directory
from cluster.control.ray_runtime import RayRuntime
from cluster.control.readiness import Snapshot
from cluster.control.reservations import alone, alone_model
from cluster.control.room import check_room
from replicas.leader.record import ReplicaRecord

_CALL_TIMEOUT_S = 10.0
_POLL_S = 0.1
_SERVE_POLL_S = 1.0
_DELETE_S = 15.0
"""What Serve needs to delete applications beside the time that requests have to finish."""
OnProgress = Callable[[Snapshot], None]


class ClusterRun:
    """One cluster, from `start` to `stop`; `plan` is what runs, or is on its way to."""

    def __init__(self, plan: ClusterPlan, runtime: RayRuntime) -> None:
        self.plan = plan
        self.runtime = runtime
        self._directory: Any = None
        self._serve_due_s = 0.0
        self._waiting_for = ""
        self._is_settled = False

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
            check_room([(model, model.replicas) for model in self.plan.models])
        self._directory = start_directory(self.plan.name)
        serve.start(proxy_location="Disabled")
        self.deploy(self.plan.models, self.plan)

    def reserved(self, model: ModelPlan) -> ModelPlan:
        """A model with what its processes reserve in this runtime."""
        return alone_model(model) if self.runtime.owned else model

    def deploy(self, models: Iterable[ModelPlan], front: ClusterPlan) -> None:
        """Have Serve make these engines and the gateways of `front`; returns at once.

        Replicas that run already go on; Serve starts those that are missing and takes away those
        that are too many.
        """
        front = alone(front) if self.runtime.owned else front
        host = "127.0.0.1" if self.runtime.owned else ""
        engines = [deployments.engine_target(front, self.reserved(model), host) for model in models]
        gateway = deployments.gateway_target(front, self.runtime)
        serve.run_many([*engines, gateway], wait_for_applications_running=False)
        self._is_settled, self._serve_due_s = False, 0.0

    def delete(self, models: Sequence[str], timeout_s: float) -> None:
        """Take models away: their replicas drain; returns when they are gone, or raises.

        Raises:
            UnavailableError: not within `timeout_s` seconds.
        """
        apps = [names.engine_app(self.plan.name, model) for model in models]
        for app in apps:
            serve.delete(app, _blocking=False)
        if not self._wait_deleted(apps, timeout_s):
            raise UnavailableError(
                f"{', '.join(apps)} still run after {timeout_s:.0f} s.",
                "Look at the actors in the Ray dashboard.",
            )
        forgotten = [self._directory.forget_model.remote(model) for model in models]
        ray.get(forgotten, timeout=_CALL_TIMEOUT_S)

    def wait_ready(self, timeout_s: float, on_progress: OnProgress) -> None:
        """Wait until every replica of `plan` and a gateway answer; raises as `wait`."""
        self.wait(lambda snapshot: readiness.is_grown(self.plan, snapshot), timeout_s, on_progress)

    def wait(
        self, is_done: Callable[[Snapshot], bool], timeout_s: float, on_progress: OnProgress
    ) -> None:
        """Wait until `is_done` of a snapshot.

        Raises:
            PenstockError: the root cause, when a replica cannot start.
            UnavailableError: not done within `timeout_s` seconds; says what is missing.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            snapshot = self.snapshot()
            on_progress(snapshot)
            if is_done(snapshot):
                return
            if error := readiness.failure(snapshot):
                raise error
            self._check_serve(snapshot)
            if time.monotonic() > deadline_s:
                raise UnavailableError(
                    f"Not ready after {timeout_s:.0f} s: {readiness.missing(snapshot)}.",
                    "Look at the actors in the Ray dashboard, or raise --timeout.",
                )
            time.sleep(_POLL_S)

    def wait_settled(self, timeout_s: float) -> None:
        """Wait until Serve has brought all applications to what was deployed last.

        Raises:
            UnavailableError: not within `timeout_s` seconds.
        """
        deadline_s = time.monotonic() + timeout_s
        while not self._is_settled:
            self._serve_due_s = 0.0
            self._check_serve(self.snapshot())
            if time.monotonic() > deadline_s:
                raise UnavailableError(f"Ray Serve still works on it: {self._waiting_for}.")
            time.sleep(_POLL_S)

    def snapshot(self) -> Snapshot:
        """The state of every replica, as the directory and Serve see it."""
        _, records = ray.get(self._directory.snapshot.remote(), timeout=_CALL_TIMEOUT_S)
        replicas = tuple(from_json(ReplicaRecord, record) for record in records)
        return Snapshot(
            replicas=replicas,
            gateway_ready=own_gateway.is_ready(self.plan.gateway),
            waiting_for=self._waiting_for,
        )

    def stop(self) -> None:
        """Take everything of this cluster down; best effort in each step, complete in sum."""
        apps = list(self._models_by_app())
        with suppress(RayError, RuntimeError, TimeoutError):
            for app in apps:
                serve.delete(app, _blocking=False)
        if self._directory is not None:
            with suppress(RayError, RuntimeError):
                ray.kill(self._directory)
        if not self.runtime.owned:
            self._wait_deleted(apps, self.plan.drain_s + _DELETE_S)

    def _models_by_app(self) -> dict[str, str | None]:
        """The model of each application; None for the gateway's."""
        engines = {
            names.engine_app(self.plan.name, model.name): model.name for model in self.plan.models
        }
        return {names.gateway_app(self.plan.name): None, **engines}

    def _check_serve(self, snapshot: Snapshot) -> None:
        """Ask Serve, at most once a second, what it waits for and whether it gave up."""
        if time.monotonic() < self._serve_due_s:
            return
        self._serve_due_s = time.monotonic() + _SERVE_POLL_S
        applications = serve.status().applications
        waiting = []
        is_settled = True
        for app, model in self._models_by_app().items():
            status = applications.get(app)
            is_settled &= status is not None and status.status == ApplicationStatus.RUNNING
            if status is None:
                continue
            if status.status == ApplicationStatus.DEPLOY_FAILED:
                raise readiness.failure(snapshot, model) or InternalError(
                    f"Ray Serve could not deploy {app}: {status.message.rstrip('.')}.",
                    "The log of its replica, in the Ray dashboard under Serve, says why.",
                )
            waiting += [item.message for item in status.deployments.values() if item.message]
        self._waiting_for = "; ".join(waiting)
        self._is_settled = is_settled

    def _wait_deleted(self, apps: Iterable[str], timeout_s: float) -> bool:
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            if not set(apps) & serve.status().applications.keys():
                return True
            time.sleep(_POLL_S)
        return False
