"""Which bundle of the placement group each rank takes, so that ranks are ordered by node. Pure.

    tensor parallel    bundle 0 leader | 1: rank 0 | 2: rank 1 | ...           all on one node
    expert parallel    bundle 0 leader | 1: a tensor-parallel group | 2: a group | ...

A bundle never spans nodes, so a whole group in one bundle shares a node wherever Ray puts it.
Groups are numbered node by node, because exchanges treat the ranks of a node as neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.base.plan import ModelPlan
from cluster.dist.rank_topology import order_by_node


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Where one rank sits."""

    bundle: int
    node: str


def bundles(plan: ModelPlan) -> list[dict[str, float]]:
    """The placement group of a replica: what Ray reserves for the leader and the ranks."""
    num_bundles, ranks_each = plan.tp_size, 1
    if plan.experts is not None:
        num_bundles, ranks_each = plan.dp_size, plan.tp_size
    each: dict[str, float] = {"CPU": plan.cpus_per_rank * ranks_each}
    if plan.gpus_per_rank:
        each["GPU"] = plan.gpus_per_rank * ranks_each
    return [{"CPU": plan.leader_cpus}, *(dict(each) for _ in range(num_bundles))]


def strategy(plan: ModelPlan) -> str:
    """How Ray spreads the bundles: on one node, or on few."""
    return "STRICT_PACK" if plan.experts is None else "PACK"


def seat_ranks(plan: ModelPlan, node_of_bundle: Sequence[str]) -> tuple[Seat, ...]:
    """The seat of each rank of a replica.

    Args:
        node_of_bundle: where Ray put each bundle, the leader's first.
    """
    if plan.experts is None:
        return tuple(
            Seat(bundle=rank + 1, node=node_of_bundle[rank + 1]) for rank in range(plan.tp_size)
        )
    return tuple(
        Seat(bundle=index + 1, node=node_of_bundle[index + 1])
        for index in order_by_node(node_of_bundle[1:])
        for _ in range(plan.tp_size)
    )
