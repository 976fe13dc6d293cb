"""Whether a Ray cluster that others use too has room for what is to be deployed.

Replicas reserve the memory of their plan (`replicas/leader/seating.py`). What Ray cannot reserve it
waits for without a word; here it is said beforehand. The planner has made sure already that the
nodes could hold everything if nothing else ran.
"""

from __future__ import annotations

import ray

from cluster.base.amount_text import size_text
from cluster.base.errors import UnavailableError
from cluster.base.plan import ClusterPlan
from replicas.leader.seating import bundles


def check_room(plan: ClusterPlan) -> None:
    """Ask Ray what is free, and compare.

    Raises:
        UnavailableError: the models reserve more memory than is left.
    """
    free = ray.available_resources().get("memory")
    total = ray.cluster_resources().get("memory")
    if free is not None and total is not None:
        refuse_shortage(plan, int(free), int(total))


def refuse_shortage(plan: ClusterPlan, free_bytes: int, total_bytes: int) -> None:
    """Raise when the models need more than `free_bytes`.

    Args:
        total_bytes: what all nodes have for reservations.
    """
    needs = {
        model.name: int(model.replicas * sum(each.get("memory", 0.0) for each in bundles(model)))
        for model in plan.models
    }
    if sum(needs.values()) <= free_bytes:
        return
    parts = ", ".join(f"{name} {size_text(need)}" for name, need in needs.items())
    raise UnavailableError(
        f"The models reserve {size_text(sum(needs.values()))} of memory ({parts}), but "
        f"{size_text(free_bytes)} of the Ray cluster's {size_text(total_bytes)} are free.",
        "Take down what else runs there (`ray status` lists it), or lower replicas or "
        "kv_cache.memory.",
    )
