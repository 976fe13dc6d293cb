"""Pod templates: what every pod of a cluster has, and what head, gateways and engines have each.

Pods run as a user without rights on a read-only root; what they write is on volumes named here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from cluster.base.env import RAY_DEFAULTS
from cluster.base.front_plan import GatewayPlan
from cluster.base.plan import ClusterPlan, EngineKind, ModelPlan
from cluster.control.kuberay.options import RenderOptions
from cluster.control.kuberay.pod_plan import AGENT_PORT, CACHE_DIR, RAY_PORTS, ranks_per_pod
from cluster.control.kuberay.secrets import secret_volumes
from cluster.control.serve_config import GATEWAY_GROUP, GROUP_LABEL
from cluster.planner.memory import FRONT_PROCESS_BYTES, NODE_OVERHEAD_BYTES
from replicas.leader.seating import rank_bytes

OBJECT_STORE_BYTES = 100 * 10**6
CLUSTER_LABEL = "app.kubernetes.io/instance"
GRPC_SERVICE = "penstock.v1.Penstock"
_MIB = 1 << 20
_SHM_BYTES = 256 * _MIB
_NCCL_SHM_BYTES = 1024 * _MIB
_HEAD_BYTES = 3072 * _MIB
_GPU_RANK_HOST_BYTES = 4096 * _MIB
"""Host memory of a rank on a GPU: its process, and checkpoint pages while it loads."""
_LEAVE_S = 30
_USER = 1000
Json = dict[str, Any]


def labels(cluster: str, group: str) -> dict[str, str]:
    """Labels that outlive a Ray cluster, for what selects pods."""
    return {
        "app.kubernetes.io/name": "penstock",
        CLUSTER_LABEL: cluster,
        GROUP_LABEL: group,
    }


def head_pod(plan: ClusterPlan, options: RenderOptions) -> Json:
    """Ray's own processes; it offers no CPUs, so nothing of ours runs there."""
    ports = RAY_PORTS | {"dashboard": plan.dashboard_port} | front_ports(plan)
    container = _container("ray-head", options, cpus=1, num_bytes=_HEAD_BYTES, ports=ports)
    return _pod(plan, "head", container, [])


def gateway_pod(plan: ClusterPlan, options: RenderOptions) -> Json:
    """One gateway; ready when it reaches a replica of every model."""
    num_bytes = NODE_OVERHEAD_BYTES + 2 * FRONT_PROCESS_BYTES
    container = _container(
        "ray-worker", options, cpus=1, num_bytes=num_bytes, ports=front_ports(plan)
    )
    container["readinessProbe"] = {
        **_readiness(plan.gateway),
        "periodSeconds": 5,
        "timeoutSeconds": 5,
        "failureThreshold": 3,
    }
    # Endpoints forget a pod when it is told to go; streams that run have until the deadline.
    scheme = "http" if plan.gateway.tls is None else "https"
    metrics = f"{scheme}://127.0.0.1:{plan.gateway.http_port}/metrics"
    volumes = [_models_volume(plan, options), *secret_volumes(plan)]
    leave = ["python", "-m", "cluster.control.pod_leave", metrics, f"{plan.drain_s:g}"]
    container["lifecycle"] = {"preStop": {"exec": {"command": leave}}}
    return _pod(plan, GATEWAY_GROUP, container, volumes)


def engine_pod(plan: ClusterPlan, model: ModelPlan, group: str, options: RenderOptions) -> Json:
    """One replica of a model, or the part of it that one pod holds."""
    container = _container(
        "ray-worker",
        options,
        cpus=engine_cpus(model),
        num_bytes=_engine_bytes(model),
        ports=front_ports(plan),
    )
    if gpus := engine_gpus(model):
        for bound in ("requests", "limits"):
            container["resources"][bound][options.gpu_resource] = str(gpus)
    # KubeRay's own probe asks for Serve's HTTP proxy, which is off.
    container["readinessProbe"] = {
        "httpGet": {"path": "/api/healthz", "port": AGENT_PORT},
        "periodSeconds": 5,
        "timeoutSeconds": 5,
        "failureThreshold": 3,
    }
    volumes = [_models_volume(plan, options), *_disk_volumes(model, container)]
    return _pod(plan, group, container, volumes, shm_bytes=_shm_bytes(model))


def _readiness(gateway: GatewayPlan) -> Json:
    """What Kubernetes asks; its gRPC probe cannot speak TLS."""
    if gateway.tls is None:
        return {"grpc": {"port": gateway.grpc_port, "service": GRPC_SERVICE}}
    return {"httpGet": {"path": "/readyz", "port": gateway.http_port, "scheme": "HTTPS"}}


def front_ports(plan: ClusterPlan) -> dict[str, int]:
    """The gateway's ports under the names that KubeRay looks for on every pod."""
    return {"serve": plan.gateway.http_port, "serve-grpc": plan.gateway.grpc_port}


def engine_cpus(model: ModelPlan) -> int:
    """CPUs of a pod: what its ranks and the leader reserve, in whole ones."""
    ranks = ranks_per_pod(model)
    asked = max(model.cpus_per_rank, float(model.num_threads)) * ranks + model.leader_cpus
    least = model.cpus_per_rank * ranks + model.leader_cpus
    # The leader waits most of the time, and shares the cores of the ranks where those take all.
    return max(math.ceil(least - 1e-9), math.floor(asked + 1e-9))


def engine_gpus(model: ModelPlan) -> int:
    """GPUs of a pod."""
    return round(model.gpus_per_rank * ranks_per_pod(model))


def engine_ray_memory(model: ModelPlan) -> int:
    """What Ray may reserve in a pod: what the part of a replica needs, so that no two fit."""
    return rank_bytes(model) * ranks_per_pod(model)


def _engine_bytes(model: ModelPlan) -> int:
    """Memory of a pod: ranks, leader, Ray, and memory that is only there as files of /dev/shm."""
    own = engine_ray_memory(model) + model.memory.shared_bytes
    if model.device == "cuda":
        own += _GPU_RANK_HOST_BYTES * ranks_per_pod(model)
    return own + FRONT_PROCESS_BYTES + NODE_OVERHEAD_BYTES + _shm_bytes(model)


def _shm_bytes(model: ModelPlan) -> int:
    is_nccl = model.device == "cuda" and model.num_ranks > 1
    return _SHM_BYTES + (_NCCL_SHM_BYTES if is_nccl else 0)


def _container(
    name: str, options: RenderOptions, *, cpus: int, num_bytes: int, ports: dict[str, int]
) -> Json:
    amounts = {"cpu": str(cpus), "memory": f"{math.ceil(num_bytes / _MIB)}Mi"}
    return {
        "name": name,
        "image": options.image,
        "imagePullPolicy": "IfNotPresent",
        "ports": [{"name": port, "containerPort": number} for port, number in ports.items()],
        "env": [
            {"name": "PENSTOCK_CACHE_DIR", "value": CACHE_DIR},
            {"name": "HOME", "value": "/tmp"},
            {"name": "HF_HUB_OFFLINE", "value": "1"},
            {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"},
            *({"name": variable, "value": value} for variable, value in RAY_DEFAULTS.items()),
        ],
        "resources": {"requests": dict(amounts), "limits": dict(amounts)},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "volumeMounts": [
            {"name": "scratch", "mountPath": "/tmp"},
            {"name": "cache", "mountPath": CACHE_DIR},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }


def _pod(
    plan: ClusterPlan,
    group: str,
    container: Json,
    volumes: Sequence[tuple[Json, str]],
    *,
    shm_bytes: int = _SHM_BYTES,
) -> Json:
    container["volumeMounts"] += [
        {"name": volume["name"], "mountPath": path, "readOnly": _is_read_only(volume)}
        for volume, path in volumes
    ]
    shm = {"medium": "Memory", "sizeLimit": f"{math.ceil(shm_bytes / _MIB)}Mi"}
    spec: Json = {
        "containers": [container],
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": math.ceil(plan.drain_s) + _LEAVE_S,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumes": [
            {"name": "scratch", "emptyDir": {}},
            {"name": "cache", "emptyDir": {}},
            {"name": "shm", "emptyDir": shm},
            *(volume for volume, _ in volumes),
        ],
    }
    if group != "head":
        spec["automountServiceAccountToken"] = False
    return {"metadata": {"labels": labels(plan.name, group)}, "spec": spec}


def _models_volume(plan: ClusterPlan, options: RenderOptions) -> tuple[Json, str]:
    return {"name": "models", **options.models.source(plan.name)}, options.models_dir


def _is_read_only(volume: Json) -> bool:
    return volume["name"] == "models" or "secret" in volume


def _disk_volumes(model: ModelPlan, container: Json) -> list[tuple[Json, str]]:
    """The directory of packed weights, where the file says which of the node's it is."""
    held = model.offload or model.zero3
    disk = held.disk_path if model.engine is EngineKind.OFFLOAD and held is not None else ""
    if not disk or disk.startswith(CACHE_DIR):
        return []
    return [({"name": "weights", "hostPath": {"path": disk, "type": "DirectoryOrCreate"}}, disk)]
