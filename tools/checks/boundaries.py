"""Which files may use a name that the rest of the code must reach through one owner."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tools.checks.source import Finding, Source

NOT_SHIPPED = ("tests/", "tools/", "bench/", "examples/")


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundary:
    """`names` (and everything below them) may be used only in `owners` and unshipped code."""

    names: tuple[str, ...]
    owners: tuple[str, ...]
    reason: str


BOUNDARIES = (
    Boundary(
        names=("os.environ", "os.environb", "os.getenv", "os.putenv", "os.unsetenv"),
        owners=("cluster/base/env.py",),
        reason="the environment is read in cluster/base/env.py",
    ),
    Boundary(
        names=("torch.cuda",),
        owners=("replicas/worker/device.py",),
        reason="torch.cuda belongs to replicas/worker/device.py",
    ),
    Boundary(
        names=("torch.distributed",),
        owners=("cluster/dist/",),
        reason="take a Communicator in the constructor; torch.distributed belongs to cluster/dist",
    ),
    Boundary(
        names=("ray",),
        owners=(
            "actor.py",
            "*_actor.py",
            "cluster/control/",
            "replicas/leader/expert_metrics.py",
            "replicas/leader/load_metrics.py",
            "replicas/leader/reporter.py",
            "replicas/leader/rank_actors.py",
            "replicas/leader/rank_seats.py",
            "replicas/leader/worker_calls.py",
            "router/app.py",
        ),
        reason="cores are plain objects; Ray belongs to the thin shells around them",
    ),
)


def check(source: Source) -> Iterator[Finding]:
    """Uses of an owned name outside its owners."""
    if not source.is_python or source.matches(*NOT_SHIPPED):
        return
    for boundary in BOUNDARIES:
        if source.matches(*boundary.owners):
            continue
        for line in sorted({line for line, name in source.names if _owns(boundary, name)}):
            yield Finding(path=source.path, line=line, message=boundary.reason)


def _owns(boundary: Boundary, name: str) -> bool:
    return any(name == owned or name.startswith(f"{owned}.") for owned in boundary.names)
