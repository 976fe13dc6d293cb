"""Plan -> the RayService: one worker group for gateways, one for each model, and Serve's config.

A change that KubeRay can make in place must not touch `rayClusterConfig`, since any other one means
a second Ray cluster. So the number of replicas stands in `serveConfigV2` alone; pods follow through
Ray's autoscaler, between none and `--max-replicas`.
"""

from __future__ import annotations

import math
from typing import Any

import yaml

from cluster.base.plan import ClusterPlan, ModelPlan
from cluster.control.kuberay import pods
from cluster.control.kuberay.options import RAY_VERSION, RenderOptions
from cluster.control.kuberay.pod_plan import group_name, pods_per_replica
from cluster.control.serve_config import GATEWAY_GROUP, GROUP_LABEL, serve_config

_GATEWAYS = 8
"""Pods that gateways may have without another Ray cluster."""
_IDLE_S = 60


def ray_service(plan: ClusterPlan, options: RenderOptions) -> dict[str, Any]:
    """The object."""
    groups = {model.name: group_name(model.name) for model in plan.models}
    engines = [_engine_group(plan, model, groups[model.name], options) for model in plan.models]
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": plan.name, "labels": pods.labels(plan.name, "service")},
        "spec": {
            "excludeHeadPodFromServeSvc": True,
            # The old cluster of an upgrade goes when its streams had their time.
            "rayClusterDeletionDelaySeconds": math.ceil(plan.drain_s) + 60,
            "upgradeStrategy": {"type": "NewCluster"},
            "serveConfigV2": yaml.safe_dump(serve_config(plan, groups), sort_keys=False, width=100),
            "rayClusterConfig": {
                "rayVersion": RAY_VERSION,
                "enableInTreeAutoscaling": True,
                "autoscalerOptions": _autoscaler(),
                "headGroupSpec": {
                    "rayStartParams": {
                        "num-cpus": "0",
                        "dashboard-host": "0.0.0.0",
                        "dashboard-port": str(plan.dashboard_port),
                        "object-store-memory": str(pods.OBJECT_STORE_BYTES),
                    },
                    "template": pods.head_pod(plan, options),
                },
                "workerGroupSpecs": [_gateway_group(plan, options), *engines],
            },
        },
    }


def _autoscaler() -> dict[str, Any]:
    return {
        "version": "v2",
        "upscalingMode": "Default",
        "idleTimeoutSeconds": _IDLE_S,
        "resources": {
            "requests": {"cpu": "200m", "memory": "512Mi"},
            "limits": {"cpu": "500m", "memory": "512Mi"},
        },
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        },
    }


def _gateway_group(plan: ClusterPlan, options: RenderOptions) -> dict[str, Any]:
    params = {"num-cpus": "1", "object-store-memory": str(pods.OBJECT_STORE_BYTES)}
    return _group(GATEWAY_GROUP, params, _GATEWAYS, pods.gateway_pod(plan, options))


def _engine_group(
    plan: ClusterPlan, model: ModelPlan, group: str, options: RenderOptions
) -> dict[str, Any]:
    params = {
        "num-cpus": str(pods.engine_cpus(model)),
        "memory": str(pods.engine_ray_memory(model)),
        "object-store-memory": str(pods.OBJECT_STORE_BYTES),
    }
    if gpus := pods.engine_gpus(model):
        params["num-gpus"] = str(gpus)
        del params["memory"]  # of the host, of which such ranks reserve none
    most = options.max_replicas * pods_per_replica(model)
    return _group(group, params, most, pods.engine_pod(plan, model, group, options))


def _group(
    name: str, params: dict[str, str], most: int, template: dict[str, Any]
) -> dict[str, Any]:
    return {
        "groupName": name,
        "minReplicas": 0,
        "maxReplicas": most,
        "idleTimeoutSeconds": _IDLE_S,
        "labels": {GROUP_LABEL: name},
        "rayStartParams": params,
        "template": template,
    }
