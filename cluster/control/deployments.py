"""Plan -> Ray Serve applications: one per model, one for the gateway.

Every replica of a model owns a placement group; `replicas/leader/seating.py` says what is in it.
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve.api import RunTarget

from cluster.base import names
from cluster.base.plan import ClusterPlan, EngineKind, ModelPlan, to_json
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
_DRAIN_S = 5.0
_ON_NODE = 0.001
"""Of the resource 1 that every node has under its own address: enough to be sent there."""
_WORKERS = {
    EngineKind.TENSOR_PARALLEL: WorkerActor,
    EngineKind.OFFLOAD: OffloadWorkerActor,
    EngineKind.EXPERT_PARALLEL: WorkerActor,
}


def engine_target(cluster: str, model: ModelPlan, host: str) -> RunTarget:
    """The Serve application of one model; its leaders and ranks listen on `host`.

    An empty `host` stands for each node's own address, for clusters of several nodes.
    """
    deployment: Any = serve.deployment(
        LeaderReplica,
        name="leader",
        num_replicas=model.replicas,
        ray_actor_options={"num_cpus": model.leader_cpus},
        placement_group_bundles=bundles(model),
        placement_group_strategy=strategy(model),
        health_check_period_s=_HEALTH_PERIOD_S,
        health_check_timeout_s=_HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=_DRAIN_S,
        graceful_shutdown_wait_loop_s=0.2,
        max_constructor_retry_count=3,
    )
    return RunTarget(
        target=deployment.bind(to_json(model), cluster, host, _WORKERS[model.engine]),
        name=names.engine_app(cluster, model.name),
        route_prefix=None,
    )


def gateway_target(plan: ClusterPlan, runtime: RayRuntime) -> RunTarget:
    """The Serve application of the gateway: all its processes on this node, where `up` runs.

    They share their ports, which only processes of one node can; and it is where the user is told
    to connect to.
    """
    deployment: Any = serve.deployment(
        GatewayReplica,
        name="gateway",
        num_replicas=plan.gateway.replicas,
        ray_actor_options={
            "num_cpus": plan.gateway.cpus,
            "resources": {runtime.node_resource: _ON_NODE},
        },
        health_check_period_s=_HEALTH_PERIOD_S,
        health_check_timeout_s=_HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=_DRAIN_S,
        graceful_shutdown_wait_loop_s=0.2,
        max_constructor_retry_count=3,
    )
    return RunTarget(
        target=deployment.bind(to_json(plan), runtime.dashboard_url),
        name=names.gateway_app(plan.name),
        route_prefix=None,
    )
