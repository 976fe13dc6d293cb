"""What processes reserve of the CPUs in a Ray runtime that runs nothing but this cluster.

Ray's account of CPUs decides where processes go and keeps others out. On a machine of our own there
is neither a choice nor anybody else, and full reservations would only leave no room for replicas
that are added later. So what the planner chose by itself shrinks to a token there; memory, GPUs and
what the file asks for by number stay as they are.
"""

from __future__ import annotations

import dataclasses

from cluster.base.plan import ClusterPlan, ModelPlan

TOKEN_CPUS = 0.01


def alone(plan: ClusterPlan) -> ClusterPlan:
    """The gateway's reservations in a runtime of its own."""
    return dataclasses.replace(plan, gateway=dataclasses.replace(plan.gateway, cpus=TOKEN_CPUS))


def alone_model(model: ModelPlan) -> ModelPlan:
    """A model's reservations in a runtime of its own."""
    is_ours = bool(model.reasons.get("cpus_per_rank"))
    return dataclasses.replace(
        model,
        leader_cpus=TOKEN_CPUS,
        cpus_per_rank=TOKEN_CPUS if is_ours else model.cpus_per_rank,
    )
