"""Plan -> Ray Serve applications: one per model, one for the gateway.

Every replica of a model owns a placement group; `replicas/leader/seating.py` says what is in it.
What may change while an application runs is its number of replicas and its `user_config`; all else
makes another version, which Serve answers with new processes.
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve.api import RunTarget

from cluster.base import names
from cluster.base.plan import ClusterPlan, EngineKind, ModelPlan, to_json
from cluster.base.replica_version import replica_version
from cluster.control.ray_runtime import RayRuntime
from offload.actor import OffloadWorkerActor
from replicas.leader.actor import LeaderReplica
from replicas.leader.seating import bundles, strategy
from replicas.worker.actor import WorkerActor
from router.app import GatewayReplica

# Health is judged by step progress inside the leader, which ends itself; Serve's check is the net
# under it, so its period may be short without being the detector.
_HEALTH_PERIOD_S = 1.0
_HEALTH_TIMEOUT_S = 10.0
_LEAVE_S = 5.0
"""What a replica needs to go when its requests have ended or run out of time."""
_ON_NODE = 0.001
"""Of the resource 1 that every node has under its own address: enough to be sent there."""
_WORKERS = {
    EngineKind.TENSOR_PARALLEL: WorkerActor,
    EngineKind.OFFLOAD: OffloadWorkerActor,
    EngineKind.EXPERT_PARALLEL: WorkerActor,
}


def engine_target(plan: ClusterPlan, model: ModelPlan, host: str) -> RunTarget:
    """The Serve application of one model; its leaders and ranks listen on `host`.

    An empty `host` stands for each node's own address, for clusters of several nodes.
    """
    deployment = _of_version(leader_deployment(model, plan.drain_s), replica_version(model))
    return RunTarget(
        target=bind_leader(deployment, model, plan.name, host),
        name=names.engine_app(plan.name, model.name),
        route_prefix=None,
    )


def leader_deployment(model: ModelPlan, drain_s: float, **options: Any) -> Any:
    """The deployment of a model's leaders, not bound to arguments yet."""
    return serve.deployment(
        LeaderReplica,
        name="leader",
        num_replicas=model.replicas,
        user_config=leader_settings(drain_s),
        ray_actor_options={"num_cpus": model.leader_cpus},
        placement_group_bundles=bundles(model),
        placement_group_strategy=strategy(model),
        **upkeep(drain_s),
        **options,
    )


def bind_leader(deployment: Any, model: ModelPlan, cluster: str, host: str) -> Any:
    """The application of a leader deployment."""
    return deployment.bind(to_json(model), cluster, host, _WORKERS[model.engine])


def leader_settings(drain_s: float) -> dict[str, float]:
    """What leaders are told again whenever it changes."""
    return {"drain_s": drain_s}


def gateway_target(plan: ClusterPlan, runtime: RayRuntime) -> RunTarget:
    """The Serve application of the gateway: all its processes on this node, where `up` runs.

    They share their ports, which only processes of one node can; and it is where the user is told
    to connect to.
    """
    where = {"resources": {runtime.node_resource: _ON_NODE}}
    deployment = _of_version(gateway_deployment(plan, where), "gateway")
    return RunTarget(
        target=deployment.bind(to_json(plan), runtime.dashboard_url),
        name=names.gateway_app(plan.name),
        route_prefix=None,
    )


def gateway_deployment(plan: ClusterPlan, where: dict[str, Any]) -> Any:
    """The deployment of gateways, not bound to arguments yet.

    Args:
        where: actor options that say which nodes they may run on.
    """
    return serve.deployment(
        GatewayReplica,
        name="gateway",
        num_replicas=plan.gateway.replicas,
        user_config=to_json(plan),
        ray_actor_options={"num_cpus": plan.gateway.cpus, **where},
        **upkeep(plan.drain_s),
    )


def upkeep(drain_s: float) -> dict[str, Any]:
    """How Serve looks after a deployment, and how long it waits for one that leaves."""
    return {
        "health_check_period_s": _HEALTH_PERIOD_S,
        "health_check_timeout_s": _HEALTH_TIMEOUT_S,
        "graceful_shutdown_timeout_s": drain_s + _LEAVE_S,
        "graceful_shutdown_wait_loop_s": 0.2,
        "max_constructor_retry_count": 3,
    }


def _of_version(deployment: Any, version: str) -> Any:
    """Say which version of its code and arguments a deployment is.

    `serve.run` draws a new one each time, and so would restart replicas that only get company.
    Serve's configuration files, which have no such way, are deployed with a version like ours; its
    Python interface keeps it to itself.
    """
    return deployment.options(version=version, _internal=True)
