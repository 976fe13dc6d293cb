"""What stands around the RayService: Services, disruption budgets, network policies, a claim."""

from __future__ import annotations

import math
from typing import Any

from cluster.base.plan import ClusterPlan
from cluster.control.kuberay.options import RenderOptions, VolumeKind, claim_name
from cluster.control.kuberay.pod_plan import group_name, pods_per_replica
from cluster.control.kuberay.pods import CLUSTER_LABEL, labels
from cluster.control.serve_config import GATEWAY_GROUP, GROUP_LABEL

_GIB = 1 << 30
_SPARE = 1.25
"""Room on the claim for files beside the weights, and for another revision of a small model."""
Json = dict[str, Any]


def services(plan: ClusterPlan) -> list[Json]:
    """The address of the cluster, and one that clients can balance over by themselves.

    gRPC keeps a connection; behind the first all calls of a client meet one gateway, behind the
    second (`dns:///NAME-grpc:PORT` with `round_robin`) they spread.
    """
    is_plain = plan.gateway.tls is None
    grpc = {
        "name": "grpc",
        "port": plan.gateway.grpc_port,
        "targetPort": "serve-grpc",
        "appProtocol": "kubernetes.io/h2c" if is_plain else "https",
    }
    http = {"name": "http", "port": plan.gateway.http_port, "targetPort": "serve"}
    if not is_plain:
        http["appProtocol"] = "https"
    selector = {CLUSTER_LABEL: plan.name, GROUP_LABEL: GATEWAY_GROUP}
    every = {"selector": selector, "ports": [grpc, http]}
    return [
        _object("v1", "Service", plan.name, f"{plan.name}-api", {"type": "ClusterIP", **every}),
        _object("v1", "Service", plan.name, f"{plan.name}-grpc", {"clusterIP": "None", **every}),
    ]


def disruption_budgets(plan: ClusterPlan) -> list[Json]:
    """Evictions take one gateway, or one replica of a model, at a time, and never the last one."""
    wanted = {GATEWAY_GROUP: (plan.gateway.replicas, 1)}
    for model in plan.models:
        wanted[group_name(model.name)] = (model.replicas, pods_per_replica(model))
    return [
        _object(
            "policy/v1",
            "PodDisruptionBudget",
            plan.name,
            f"{plan.name}-{group}",
            {
                # An integer: pods of a custom resource take nothing else.
                "minAvailable": max(count - 1, 1) * pods,
                "selector": {"matchLabels": {CLUSTER_LABEL: plan.name, GROUP_LABEL: group}},
            },
        )
        for group, (count, pods) in wanted.items()
    ]


def network_policies(plan: ClusterPlan) -> list[Json]:
    """Ray listens on every interface of a pod: only pods of the cluster may reach it.

    Clients reach the gateways' two ports, from the same namespace; KubeRay the head's dashboard.
    """
    ours = {"podSelector": {"matchLabels": {CLUSTER_LABEL: plan.name}}}
    gateway, head = (
        {CLUSTER_LABEL: plan.name, GROUP_LABEL: group} for group in ("gateway", "head")
    )
    operator = {
        "namespaceSelector": {},
        "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}},
    }
    front = [_port(plan.gateway.grpc_port), _port(plan.gateway.http_port)]
    dns = [_port(53, "UDP"), _port(53)]
    return [
        _policy(
            plan,
            "inside",
            {CLUSTER_LABEL: plan.name},
            ingress=[{"from": [ours]}],
            egress=[{"to": [ours]}, {"ports": dns}],
        ),
        _policy(
            plan, "clients", gateway, ingress=[{"from": [{"podSelector": {}}], "ports": front}]
        ),
        _policy(
            plan,
            "operator",
            head,
            ingress=[{"from": [operator], "ports": [_port(plan.dashboard_port)]}],
            # The autoscaler beside the head asks the API server for pods.
            egress=[{"ports": [_port(443), _port(6443)]}],
        ),
    ]


def models_claim(plan: ClusterPlan, options: RenderOptions) -> list[Json]:
    """The claim that holds checkpoints, unless another volume does."""
    if options.models.kind is not VolumeKind.CLAIM or options.models.name:
        return []
    num_bytes = sum(
        model.num_ranks * model.memory.weights_bytes
        for model in {model.path: model for model in plan.models}.values()
    )
    spec = {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": f"{math.ceil(_SPARE * num_bytes / _GIB)}Gi"}},
    }
    return [_object("v1", "PersistentVolumeClaim", plan.name, claim_name(plan.name), spec)]


def _policy(
    plan: ClusterPlan, name: str, selector: Json, *, ingress: list[Json], egress: Any = None
) -> Json:
    types = ["Ingress", *(["Egress"] if egress is not None else [])]
    spec = {"podSelector": {"matchLabels": selector}, "policyTypes": types, "ingress": ingress}
    if egress is not None:
        spec["egress"] = egress
    return _object("networking.k8s.io/v1", "NetworkPolicy", plan.name, f"{plan.name}-{name}", spec)


def _port(number: int, protocol: str = "TCP") -> Json:
    return {"protocol": protocol, "port": number}


def _object(version: str, kind: str, cluster: str, name: str, spec: Json) -> Json:
    return {
        "apiVersion": version,
        "kind": kind,
        "metadata": {"name": name, "labels": labels(cluster, "service")},
        "spec": spec,
    }
