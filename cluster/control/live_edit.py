"""Applies edited cluster files to a running cluster, one at a time.

Owns what the running cluster was made from: its file as last applied, and the machines it was
planned for. An edit that is refused, or whose replicas do not start, changes nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from cluster.base.amount_text import duration_text
from cluster.base.errors import UnavailableError
from cluster.base.load import ClusterFile
from cluster.base.plan import ClusterPlan
from cluster.control.changes import Changes, compare
from cluster.control.lifecycle import ClusterRun, OnProgress
from cluster.control.next_plan import next_plan
from cluster.control.rollout import Rollout
from cluster.dist.topology import Topology
from cluster.planner.hub import Hub


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedEdit:
    """What an edit will do, decided but not done."""

    changes: Changes
    plan: ClusterPlan

    def lines(self, before: ClusterPlan) -> list[str]:
        """In words, one line a change."""
        drain = f"at most {duration_text(before.drain_s)} for running requests"
        models = {model.name: model for model in self.plan.models}
        lines = [
            f"~ {change.label}: {change.before} -> {change.after}" for change in self.changes.fields
        ]
        for name in self.changes.added:
            model = models[name]
            lines.append(
                f"+ {name}: {model.engine.value}, {model.replicas} x {model.num_ranks} rank(s) "
                f"on {model.device}, context {model.scheduler.max_context}"
            )
        lines += [f"- {name}: its replicas drain, {drain}" for name in self.changes.removed]
        shrinks = any(
            models[old.name].replicas < old.replicas for old in before.models if old.name in models
        )
        return [*lines, *([f"  replicas that leave drain, {drain}"] if shrinks else [])]


class LiveEdit:
    """The running cluster's file, and the way to another one."""

    def __init__(self, file: ClusterFile, topology: Topology, hub: Hub) -> None:
        self.file = file
        self._topology = topology
        self._hub = hub
        self._busy = threading.Lock()

    def plan(self, running: ClusterPlan, edited: ClusterFile) -> PlannedEdit:
        """What `edited` changes.

        Raises:
            ClusterFileError: keys that cannot change live, or replicas that do not fit.
        """
        changes = compare(self.file, edited)
        plan = next_plan(running, edited, self._topology, self._hub) if changes else running
        return PlannedEdit(changes=changes, plan=plan)

    def apply(
        self,
        run: ClusterRun,
        edited: ClusterFile,
        on_plan: Callable[[PlannedEdit], bool],
        *,
        timeout_s: float,
        on_progress: OnProgress,
    ) -> None:
        """Plan the edit and make it, if `on_plan` agrees.

        Raises:
            UnavailableError: another edit is being made.
            PenstockError: why it is not made; the cluster is as before.
        """
        if not self._busy.acquire(blocking=False):
            raise UnavailableError(
                "Another change of this cluster is under way.", "Try again when it is done."
            )
        try:
            edit = self.plan(run.plan, edited)
            if on_plan(edit) and edit.changes:
                Rollout(run, edit.plan).go(timeout_s, on_progress)
                self.file = edited
        finally:
            self._busy.release()
