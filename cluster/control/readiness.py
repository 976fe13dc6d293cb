"""Where the parts of a cluster stand, and what is missing until they are what a plan asks for.

Pure: a `Snapshot` is what the directory, the gateway and Serve said at one moment.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.base.errors import (
    CorruptWeightsError,
    DeviceOutOfMemoryError,
    PenstockError,
    UserError,
    error_from_dict,
)
from cluster.base.plan import ClusterPlan
from replicas.leader.record import ReplicaRecord, ReplicaState

_HOPELESS = (UserError, CorruptWeightsError, DeviceOutOfMemoryError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Where the cluster stands."""

    replicas: tuple[ReplicaRecord, ...]
    gateway_ready: bool
    """Whether the gateway reaches a replica of every model."""
    waiting_for: str
    """What Ray still has to place or start; empty when everything is in place."""

    def count(self, model: str, *states: ReplicaState) -> int:
        """Replicas of a model that are in one of these states."""
        return sum(record.model == model and record.state in states for record in self.replicas)


def is_grown(plan: ClusterPlan, snapshot: Snapshot) -> bool:
    """Whether every model has as many ready replicas as planned, and the gateway reaches them."""
    return snapshot.gateway_ready and all(
        snapshot.count(model.name, ReplicaState.READY) >= model.replicas for model in plan.models
    )


def is_shrunk(plan: ClusterPlan, snapshot: Snapshot) -> bool:
    """Whether no replica is left beyond those planned, not even one that drains."""
    wanted = {model.name: model.replicas for model in plan.models}
    if any(record.state is ReplicaState.DRAINING for record in snapshot.replicas):
        return False
    alive = (ReplicaState.STARTING, ReplicaState.READY)
    return all(
        snapshot.count(name, *alive) <= wanted.get(name, 0)
        for name in {record.model for record in snapshot.replicas}
    )


def failure(snapshot: Snapshot, given_up: str | None = None) -> PenstockError | None:
    """Why waiting is of no use: a fault that a restart cannot mend.

    Args:
        given_up: a model that Serve has stopped trying; any fault of it counts.
    """
    for record in snapshot.replicas:
        if record.error is not None:
            error = error_from_dict(record.error)
            if record.model == given_up or isinstance(error, _HOPELESS):
                return _with_model(error, record.model)
    return None


def missing(snapshot: Snapshot) -> str:
    """What is not ready, in words."""
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
