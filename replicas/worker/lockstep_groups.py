"""The groups of one rank of an expert-parallel replica, which it may leave and join anew.

Two kinds: its tensor-parallel group, which shares a batch, and all members of the gathering, which
share the experts. They end together, and every gathering makes them all again under its own epoch.
What the model holds on to (the communicator) stays the same object throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cluster.base.env import default_cache_dir
from cluster.base.errors import InternalError, PenstockError
from cluster.dist.communicator import Communicator, SingleRank
from cluster.dist.expert_peers import ExpertPeers, join_expert_peers
from cluster.dist.rank_topology import RankTopology
from cluster.dist.rendezvous import Rendezvous
from cluster.dist.watched_communicator import WatchedCommunicator
from moe.row_moves import RowWork
from replicas.kernels.select import select_row_work
from replicas.worker.assembly import WeightSharers
from replicas.worker.gathering import Gathering
from replicas.worker.plan import ExpertRankPlan, WorkerPlan
from replicas.worker.tensor_rank import join_tensor_group

TellFailure = Callable[[PenstockError, tuple[int, ...]], None]
"""What ended the groups, and the ranks that are lost as far as this one knows."""
_FIRST_JOIN_S = 60.0
_JOIN_S = 15.0
"""For ranks that live already: whoever is later than this is not coming."""


@dataclass(frozen=True, slots=True)
class JoinedGroups:
    """The groups of one gathering at one rank, met but not yet used."""

    peers: ExpertPeers
    tensor_group: Communicator | None
    """None with ranks that are a tensor-parallel group each."""

    def close(self) -> None:
        """Leave them."""
        if self.tensor_group is not None:
            self.tensor_group.close()
        self.peers.close()


class LockstepGroups:
    """What a rank has joined; nothing, at first and between gatherings."""

    def __init__(self, plan: WorkerPlan) -> None:
        if plan.experts is None:
            raise InternalError("This rank has no place in an expert-parallel replica.")
        self.place: ExpertRankPlan = plan.experts
        # Before any meeting: it may have to be compiled, and later waits are short.
        self.row_work: RowWork = select_row_work(default_cache_dir() / "kernels")
        """What handles rows on their way between ranks."""
        self._plan = plan
        self._watched: WatchedCommunicator | None = None
        self.communicator: Communicator = SingleRank()
        """Over the tensor-parallel axis; its waits are watched like the exchanges'."""
        if plan.tp_size > 1:
            self.communicator = self._watched = WatchedCommunicator(plan.tp_rank, plan.tp_size)
        self._peers: ExpertPeers | None = None
        self._tell: TellFailure | None = None
        self._has_met = False

    @property
    def peers(self) -> ExpertPeers:
        """Whom the experts are shared with.

        Raises:
            InternalError: the rank is in no group now.
        """
        if self._peers is None:
            raise InternalError(f"Rank {self._plan.rank} is in no group now.")
        return self._peers

    def weight_sharers(self) -> WeightSharers:
        """The ranks of this node with the same slices of the same weights, this one among them."""
        tp_size, topology = self._plan.tp_size, self.peers.topology
        ranks = tuple(
            rank
            for rank in topology.node_ranks(self._plan.rank)
            if rank % tp_size == self._plan.tp_rank
        )
        return WeightSharers(
            index=ranks.index(self._plan.rank),
            count=len(ranks),
            join=lambda num_bytes: self.peers.join_segment(ranks, num_bytes),
        )

    def tell_failures(self, tell: TellFailure) -> None:
        """Call `tell` from another thread when the groups end by a fault, these and later ones."""
        self._tell = tell

    def join(self, gathering: Gathering) -> None:
        """`meet` and `use` in one; raises as `meet`."""
        self.use(self.meet(gathering))

    def meet(self, gathering: Gathering) -> JoinedGroups:
        """Meet the other members; all of them call it. Changes nothing here, from any thread.

        Raises:
            CollectiveTimeoutError, WorkerDiedError: not all members came.
            InternalError: the first member cannot listen where the others look for it.
        """
        limit_s = _JOIN_S if self._has_met else _FIRST_JOIN_S
        peers = join_expert_peers(
            rank=gathering.members.index(self._plan.rank),
            topology=RankTopology(gathering.nodes, gathering.members),
            rendezvous=Rendezvous(
                host=gathering.peers_host,
                port=gathering.peers_port,
                group=f"ep/{gathering.epoch}",
                connect_timeout_s=limit_s,
            ),
            timeout_s=self._plan.collective_timeout_s,
        )
        if self._watched is None:
            return JoinedGroups(peers, None)
        place = Rendezvous(
            host=gathering.tensor_host,
            port=gathering.tensor_port,
            group=f"tp/{gathering.epoch}",
            connect_timeout_s=limit_s,
        )
        try:
            return JoinedGroups(peers, join_tensor_group(self._plan, place))
        except BaseException:
            peers.close()
            raise

    def use(self, groups: JoinedGroups) -> None:
        """Be in these groups; those before must have been left.

        Raises:
            CollectiveTimeoutError, WorkerDiedError: they have failed already.
        """
        self._peers = groups.peers
        groups.peers.on_failure(self._report)
        groups.peers.watch.check()
        if self._watched is not None and groups.tensor_group is not None:
            self._watched.join(groups.tensor_group, groups.peers.watch)
        self._has_met = True

    def leave(self) -> None:
        """Close all connections to peers, which ends their waits for this rank; may be repeated."""
        if self._watched is not None:
            self._watched.close()
        peers, self._peers = self._peers, None
        if peers is not None:
            peers.close()

    def _report(self, error: PenstockError, lost: tuple[int, ...]) -> None:
        if self._tell is not None:
            self._tell(error, lost)


def first_gathering(plan: WorkerPlan) -> Gathering:
    """The one that all ranks of a replica begin with.

    Raises:
        InternalError: the rank has no place in an expert-parallel replica.
    """
    place = plan.experts
    if place is None:
        raise InternalError("This rank has no place in an expert-parallel replica.")
    return Gathering(
        epoch=plan.epoch,
        members=tuple(range(len(place.node_of_W))),
        nodes=place.node_of_W,
        peers_host=place.peers_host,
        peers_port=place.peers_port,
        tensor_host=plan.store_host,
        tensor_port=plan.store_port,
    )
