"""A running cluster from one plan to the next, without a request that notices.

First what can fail: replicas that are added start beside those that serve, and get requests when
they are ready. If they do not get there, they are taken away again and everything is as before.
Then what is certain: gateways follow the new plan, and what it has no more drains and goes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import suppress

from ray.exceptions import RayError

from cluster.base.errors import CancelledError, PenstockError
from cluster.base.plan import ClusterPlan, ModelPlan
from cluster.control import readiness
from cluster.control.lifecycle import ClusterRun, OnProgress
from cluster.control.room import Need, check_room

_SETTLE_S = 30.0
"""Serve's own work on top of what starts and of what drains."""


class Rollout:
    """One change of a running cluster; `go` does it."""

    def __init__(self, run: ClusterRun, target: ClusterPlan) -> None:
        self._run = run
        self._before = run.plan
        self._target = target
        old = {model.name: model for model in run.plan.models}
        new = {model.name for model in target.models}
        self._added = [model for model in target.models if model.name not in old]
        self._kept = [model for model in target.models if model.name in old]
        self._removed = [model for model in run.plan.models if model.name not in new]

    def needs(self) -> list[Need]:
        """Replicas that will be started."""
        running = {model.name: model.replicas for model in self._before.models}
        counts = [
            (model, model.replicas - running.get(model.name, 0)) for model in self._target.models
        ]
        return [(model, count) for model, count in counts if count > 0]

    def go(self, timeout_s: float, on_progress: OnProgress) -> None:
        """Make the change; returns when the old is gone.

        Args:
            timeout_s: how long new replicas may take to be ready.

        Raises:
            UnavailableError: there is no room; nothing was started. Or new replicas were not ready
                in time; they are gone again.
            PenstockError: why new replicas could not start; they are gone again.
        """
        needs = self.needs()
        check_room([(self._run.reserved(model), count) for model, count in needs])
        if needs:
            try:
                self._grow(timeout_s, on_progress)
            except CancelledError:
                raise  # the cluster is about to end
            except (PenstockError, RayError):
                self._undo()
                raise
        self._shrink(on_progress)

    def _grow(self, timeout_s: float, on_progress: OnProgress) -> None:
        """Add replicas; gateways learn of new models when those can answer."""
        kept = tuple(self._larger())
        front = dataclasses.replace(self._before, models=(*kept, *self._removed))
        self._run.plan = dataclasses.replace(front, models=(*front.models, *self._added))
        self._run.deploy([*kept, *self._added], front)
        self._run.wait_ready(timeout_s, on_progress)

    def _larger(self) -> Iterator[ModelPlan]:
        running = {model.name: model for model in self._before.models}
        for model in self._kept:
            before = running[model.name]
            yield dataclasses.replace(before, replicas=max(model.replicas, before.replicas))

    def _undo(self) -> None:
        """As before; best effort, for the cause is what the caller has to hear."""
        drain_s = self._before.drain_s + _SETTLE_S
        with suppress(PenstockError, RayError):
            self._run.deploy(self._before.models, self._before)
            self._run.delete([model.name for model in self._added], drain_s)
        self._run.plan = self._before

    def _shrink(self, on_progress: OnProgress) -> None:
        drain_s = max(self._before.drain_s, self._target.drain_s) + _SETTLE_S
        self._run.plan = self._target
        self._run.deploy([*self._kept, *self._added], self._target)
        # Gateways that serve the new plan send nothing more to models that are to go.
        self._run.wait_settled(drain_s)
        if self._removed:
            self._run.delete([model.name for model in self._removed], drain_s)
        self._run.wait(
            lambda snapshot: readiness.is_shrunk(self._target, snapshot), drain_s, on_progress
        )
