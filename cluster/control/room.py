"""Whether a Ray cluster has room for replicas that are to be deployed.

Replicas reserve CPUs, GPUs and the memory of their plan (`replicas/leader/seating.py`). What Ray
cannot reserve it waits for without a word; here it is said beforehand. The planner has made sure
already that the nodes could hold everything if nothing else ran.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ray

from cluster.base.amount_text import size_text
from cluster.base.errors import UnavailableError
from cluster.base.plan import ModelPlan
from replicas.leader.seating import bundles

Need = tuple[ModelPlan, int]
"""A model and how many replicas of it are to be started."""

_RESOURCES = {
    "memory": ("of memory", "kv_cache.memory"),
    "CPU": ("CPUs", "resources.cpus_per_rank"),
    "GPU": ("GPUs", "parallel.tp"),
}
_ROUNDING = 1e-6


def check_room(needs: Sequence[Need]) -> None:
    """Ask Ray what is free, and compare.

    Raises:
        UnavailableError: the replicas reserve more of something than is left.
    """
    refuse_shortage(needs, ray.available_resources(), ray.cluster_resources())


def refuse_shortage(
    needs: Sequence[Need], free: Mapping[str, float], total: Mapping[str, float]
) -> None:
    """Raise when the replicas need more than is free.

    Args:
        total: what all nodes have for reservations; what no node has is left to the planner.
    """
    for resource in _RESOURCES.keys() & total.keys():
        each = {
            model.name: count * sum(bundle.get(resource, 0.0) for bundle in bundles(model))
            for model, count in needs
        }
        # Ray leaves a resource out of which nothing is free.
        if sum(each.values()) > free.get(resource, 0.0) + _ROUNDING:
            raise _shortage(resource, each, free.get(resource, 0.0), total[resource])


def _shortage(
    resource: str, each: Mapping[str, float], free: float, total: float
) -> UnavailableError:
    def text(amount: float) -> str:
        return size_text(int(amount)) if resource == "memory" else f"{amount:g}"

    unit, key = _RESOURCES[resource]
    parts = ", ".join(f"{name} {text(need)}" for name, need in each.items())
    return UnavailableError(
        f"The models reserve {text(sum(each.values()))} {unit} ({parts}), but {text(free)} of the "
        f"Ray cluster's {text(total)} are free.",
        f"Take down what else runs there (`ray status` lists it), or lower replicas or {key}.",
    )
