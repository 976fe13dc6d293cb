"""Names under which the parts of a cluster find each other: in Ray (the dashboard shows them), by
address."""

from __future__ import annotations

NAMESPACE = "penstock"
"""Ray namespace of every named actor of ours."""


def directory_actor(cluster: str) -> str:
    """Name of the actor that knows a cluster's replicas."""
    return f"penstock:{cluster}:directory"


def gateway_app(cluster: str) -> str:
    """Serve application of the gateway."""
    return f"{cluster}-gateway"


def engine_app(cluster: str, model: str) -> str:
    """Serve application of one model's engine: models come and go without touching others."""
    return f"{cluster}-engine-{model}"


def worker_actor(cluster: str, model: str, replica_id: str, epoch: str, rank: int) -> str:
    """Name of one worker rank's actor; the epoch keeps a restart from meeting its predecessor."""
    return f"{cluster}/{model}/{replica_id}/{epoch}/rank-{rank}"


def authority(host: str, port: int) -> str:
    """`host:port` as URLs and gRPC targets spell it: an IPv6 address stands in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
