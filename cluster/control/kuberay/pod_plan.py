"""A cluster file -> plan for pods, each a Ray node that holds one replica or a part of one.

Pods of one size are planned as machines: one for the gateways, and as many for the models as their
replicas could need, so that each has one for itself. What a pod then asks Kubernetes for is what
the plan says its ranks take, not the size it was planned with. Equal inputs give equal plans.
"""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import PurePosixPath
from typing import Any

from cluster.base.errors import ConfigError
from cluster.base.load import ClusterFile
from cluster.base.plan import ClusterPlan, ModelPlan
from cluster.control.kuberay.options import RenderOptions
from cluster.control.kuberay.secrets import in_pod
from cluster.dist.topology import Device, Node, Topology
from cluster.planner.front import is_loopback
from cluster.planner.hub import Hub
from cluster.planner.memory import CPU_USABLE, FRONT_PROCESS_BYTES, NODE_OVERHEAD_BYTES
from cluster.planner.plan_file import plan_file

CACHE_DIR = "/var/cache/penstock"
RAY_PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080}
AGENT_PORT = 52365
_ANY = ("0.0.0.0", "::")
_LONGEST_NAME = 40


def plan_for_pods(file: ClusterFile, options: RenderOptions, hub: Hub) -> ClusterPlan:
    """The plan that the manifests carry: paths as pods see them, addresses of pods.

    Raises:
        ConfigError: the file says something that has no meaning in pods, or does not fit them.
    """
    _check_file(file, options)
    plan = plan_file(file, _topology(file, options), hub)
    _check_checkpoints(plan)
    gateway = dataclasses.replace(in_pod(plan.gateway), host=_ANY[0], cpus=1.0)
    return dataclasses.replace(
        plan, gateway=gateway, models=tuple(_in_pod(m, file, options) for m in plan.models)
    )


def pods_per_replica(model: ModelPlan) -> int:
    """Pods that the ranks of one replica are spread over."""
    groups = model.nodes[: model.dp_size if model.experts is not None else 1]
    return len(set(groups))


def ranks_per_pod(model: ModelPlan) -> int:
    """Ranks of the fullest pod of a replica."""
    groups = model.nodes[: model.dp_size if model.experts is not None else 1]
    return model.tp_size * max(groups.count(node) for node in groups)


def group_name(model: str) -> str:
    """The worker group of a model: what Kubernetes takes as a label and a part of names."""
    return "engine-" + re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")


def _topology(file: ClusterFile, options: RenderOptions) -> Topology:
    gateways = file.spec.gateway.replicas
    front_bytes = NODE_OVERHEAD_BYTES + gateways * FRONT_PROCESS_BYTES
    front = Node(
        node_id="gateway",
        host="gateway",
        cores=gateways,
        memory_bytes=math.ceil(front_bytes / CPU_USABLE),  # no rank fits beside them
    )
    devices = tuple(
        Device(index=index, kind="GPU", memory_bytes=options.gpu_memory_bytes)
        for index in range(options.gpus)
    )
    count = sum(model.replicas * model.parallel.dp for model in file.spec.models)
    pods = tuple(
        Node(
            node_id=f"pod-{index}",
            host=f"pod-{index}",
            cores=options.cpus,
            memory_bytes=options.memory_bytes,
            devices=devices,
        )
        for index in range(count)
    )
    return Topology(nodes=(front, *pods))


def _check_file(file: ClusterFile, options: RenderOptions) -> None:
    name, gateway = file.spec.cluster.name, file.spec.gateway
    if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name):
        raise ConfigError(
            f"{name!r} cannot name a RayService: it must begin with a letter and end with a "
            "letter or digit.",
            "Set cluster.name.",
            param="cluster.name",
        )
    if not is_loopback(gateway.host) and gateway.host not in _ANY:
        raise ConfigError(
            f"gateway.host is {gateway.host}, but pods get their addresses from Kubernetes.",
            "Leave it out: gateways then listen on their pod's address, behind the NetworkPolicy.",
            param="gateway.host",
        )
    taken = {**RAY_PORTS, "agent": AGENT_PORT, "dashboard": file.spec.dashboard.port}
    for key in ("grpc_port", "http_port"):
        port = getattr(gateway, key)
        if port in taken.values():
            raise ConfigError(
                f"gateway.{key} is {port}, a port of Ray's own in every pod.",
                "Choose another one.",
                param=f"gateway.{key}",
            )
    _check_models(file, options)


def _check_models(file: ClusterFile, options: RenderOptions) -> None:
    groups: dict[str, str] = {}
    for index, model in enumerate(file.spec.models):
        if model.replicas > options.max_replicas:
            raise ConfigError(
                f"models[{index}].replicas is {model.replicas}, but pods are made for at most "
                f"{options.max_replicas}.",
                f"Raise --max-replicas to {model.replicas} or more.",
                param=f"models[{index}].replicas",
            )
        group = group_name(model.name)
        other = groups.setdefault(group, model.name)
        if other != model.name or len(group) > _LONGEST_NAME:
            why = f"as {other} would" if other != model.name else f"over {_LONGEST_NAME} letters"
            raise ConfigError(
                f"{model.name!r} would make a worker group named {group!r}, {why}.",
                "Give it another name.",
                param=f"models[{index}].name",
            )
        disk = model.offload.disk_path if model.offload is not None else "auto"
        if disk != "auto" and not disk.startswith("/"):
            raise ConfigError(
                f"disk_path is {disk!r}, which is relative to a file that pods do not have.",
                "Write an absolute path, a directory of every node; or leave it out, for the pods' "
                "own scratch space.",
                param=f"models[{index}].offload.disk_path",
            )


def _in_pod(model: ModelPlan, file: ClusterFile, options: RenderOptions) -> ModelPlan:
    path = str(PurePosixPath(options.models_dir) / checkpoint_name(model))
    changes: dict[str, Any] = {"path": path, "source": path}
    (entry,) = [entry for entry in file.spec.models if entry.name == model.name]
    if entry.offload is None or entry.offload.disk_path == "auto":
        for part in ("offload", "zero3"):
            if (held := getattr(model, part)) is not None:
                changes[part] = dataclasses.replace(held, disk_path=f"{CACHE_DIR}/weights")
    return dataclasses.replace(model, **changes)


def _check_checkpoints(plan: ClusterPlan) -> None:
    found: dict[str, str] = {}
    for model in plan.models:
        name = checkpoint_name(model)
        if found.setdefault(name, model.source) != model.source:
            raise ConfigError(
                f"{found[name]} and {model.source} would share the directory {name!r} of the "
                "models volume.",
                "Give their directories different names.",
                param="models",
            )


def checkpoint_name(model: ModelPlan) -> str:
    """The checkpoint's directory on the models volume: the last part of what the file calls it."""
    return PurePosixPath(model.source.rstrip("/")).name
