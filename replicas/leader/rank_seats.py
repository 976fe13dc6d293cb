"""Where the ranks of a replica sit in its placement group, and the actors that are put there.

A seat outlives who sits in it: when a rank is lost, its bundle is reserved still.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import ray
from ray.util import get_current_placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.base import names
from cluster.base.errors import InternalError
from cluster.base.plan import ModelPlan
from replicas.leader.seating import name_nodes, seat_ranks
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
        self._names: dict[str, str] = {}
        self.leader_node, *_ = node_of_bundle = self._nodes_of_bundles()
        self._seats = seat_ranks(plan, node_of_bundle)
        self.nodes = tuple(seat.node for seat in self._seats)
        """Node of each rank."""

    def look_again(self, ranks: Collection[int]) -> None:
        """Learn where these seats are now: Ray moves the bundles of a node that is lost."""
        node_of_bundle = self._nodes_of_bundles()
        self.nodes = tuple(
            node_of_bundle[self._seats[rank].bundle] if rank in ranks else node
            for rank, node in enumerate(self.nodes)
        )

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

    def _nodes_of_bundles(self) -> list[str]:
        """The node of each bundle."""
        node_ids = placement_group_table(self._group)["bundles_to_node_id"]
        address_of = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        used = [node_ids[bundle] for bundle in sorted(node_ids)]
        self._names = name_nodes(used, address_of, self._names)
        return [self._names[node_id] for node_id in used]
