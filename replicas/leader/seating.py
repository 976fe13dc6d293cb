"""Which bundle of the placement group each rank takes, so that ranks are ordered by node. Pure.

    tensor parallel    bundle 0 leader | 1: rank 0 | 2: rank 1 | ...           all on one node
    expert parallel    bundle 0 leader | 1: a tensor-parallel group | 2: a group | ...
                       on one node if it streams weights, which its ranks then hold in common

A bundle never spans nodes, so a whole group in one bundle shares a node wherever Ray puts it.
Groups are numbered node by node, because exchanges treat the ranks of a node as neighbours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.base.plan import ModelPlan
from cluster.dist.rank_topology import order_by_node


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Where one rank sits."""

    bundle: int
    node: str


def bundles(plan: ModelPlan) -> list[dict[str, float]]:
    """The placement group of a replica: what Ray reserves for the leader and the ranks.

    Memory too, so that Ray puts no two replicas on a node that can hold one: the plan says where
    they fit, but Ray decides.
    """
    num_bundles, ranks_each = plan.tp_size, 1
    if plan.experts is not None:
        num_bundles, ranks_each = plan.dp_size, plan.tp_size
    each: dict[str, float] = {"CPU": plan.cpus_per_rank * ranks_each}
    if plan.gpus_per_rank:
        each["GPU"] = plan.gpus_per_rank * ranks_each
    if num_bytes := rank_bytes(plan):
        each["memory"] = float(num_bytes * ranks_each)
    return [{"CPU": plan.leader_cpus}, *(dict(each) for _ in range(num_bundles))]


def rank_bytes(plan: ModelPlan) -> int:
    """What one rank takes of its node's memory; of what replicas share, nothing.

    On a device: only what it takes of the host beside it.
    """
    if plan.device == "cuda":
        return plan.offload.host_bytes if plan.offload else plan.memory.host_bytes
    return plan.memory.total_bytes - plan.memory.shared_bytes


def strategy(plan: ModelPlan) -> str:
    """How Ray spreads the bundles: on few nodes, or on one where ranks share its memory."""
    return "STRICT_PACK" if plan.experts is None or plan.offload is not None else "PACK"


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


def name_nodes(
    node_ids: Sequence[str], address_of: Mapping[str, str], known: Mapping[str, str]
) -> dict[str, str]:
    """How nodes are called: by address, or address and id where nodes share or have shared one.

    A node keeps the name that it was given first: its ranks are neighbours by it.

    Args:
        node_ids: Ray's, of the nodes to be named.
        address_of: of every node that Ray knows, lost ones too.
        known: names given so far, by node id.
    """
    names = dict(known)
    num_sharing = Counter(address_of.values())
    for node_id in node_ids:
        if node_id not in names:
            # A bundle that Ray has not placed again is nowhere.
            address = address_of.get(node_id, "")
            names[node_id] = address if num_sharing[address] == 1 else f"{address}/{node_id[:8]}"
    return names
