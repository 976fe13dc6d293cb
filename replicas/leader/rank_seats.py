"""Where the ranks of a replica sit in its placement group, and the actors that are put there.

A seat outlives who sits in it: when a rank is lost, its bundle is reserved still.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import ray
from ray.util import get_current_placement_group, placement_group_table
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.base import names
from cluster.base.errors import InternalError
from cluster.base.plan import ModelPlan
from replicas.leader.seating import seat_ranks
from replicas.worker.actor import WorkerActor


class RankSeats:
    """The seats of one replica.

    Args:
        worker_class: the actor of each rank.

    Raises:
        InternalError: this process is in no placement group.
    """

    def __init__(
        self, plan: ModelPlan, cluster: str, replica_id: str, worker_class: type[WorkerActor]
    ) -> None:
        group = get_current_placement_group()
        if group is None:
            raise InternalError("A leader must run in a placement group with a bundle per rank.")
        self._plan = plan
        self._cluster, self._replica_id = cluster, replica_id
        self._worker_class = worker_class
        self._group = group
        self.leader_node, *_ = node_of_bundle = _nodes_of(group)
        self._seats = seat_ranks(plan, node_of_bundle)
        self.nodes = tuple(seat.node for seat in self._seats)
        """Node of each rank."""

    def name(self, rank: int, epoch: str) -> str:
        """Name of a rank's actor."""
        return names.worker_actor(self._cluster, self._plan.name, self._replica_id, epoch, rank)

    def create(self, rank: int, epoch: str) -> Any:
        """The handle of a new actor in a rank's seat; it starts when the seat is free."""
        options = {
            "name": self.name(rank, epoch),
            "namespace": names.NAMESPACE,
            "num_cpus": self._plan.cpus_per_rank,
            "num_gpus": self._plan.gpus_per_rank,
            "max_concurrency": 4,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=self._seats[rank].bundle
            ),
        }
        return ray.remote(self._worker_class).options(**options).remote()


def _nodes_of(group: PlacementGroup) -> list[str]:
    """The node of each bundle: its address, or address and id where nodes share one."""
    node_ids = placement_group_table(group)["bundles_to_node_id"]
    address_of = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    num_sharing = Counter(address_of.values())
    return [
        address_of[node_id]
        if num_sharing[address_of[node_id]] == 1
        else f"{address_of[node_id]}/{node_id[:8]}"
        for _, node_id in sorted(node_ids.items())
    ]
