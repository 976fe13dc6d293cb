"""The groups of one expert-parallel rank: everybody, its node, its rail; the memory that ranks of
the node share; connections along the rail; and the watch over all of them.

All are made together on one store, under the epoch of the rendezvous, so that nothing of an older
epoch can reach them. They fail together as well: one watch ends them all.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store

from cluster.base.errors import CollectiveTimeoutError, InternalError, PenstockError
from cluster.dist.gloo_peers import GlooPeers
from cluster.dist.node_segment import NodeSegment, join_node_segment
from cluster.dist.peer_streams import PeerStreams, StreamsMeeting, join_peer_streams
from cluster.dist.peer_watch import PeerWatch
from cluster.dist.rank_topology import RankTopology
from cluster.dist.rendezvous import Rendezvous, local_address_towards
from cluster.dist.shared_boxes import SharedBoxes, join_shared_boxes
from cluster.dist.store import open_store

DEFAULT_TIMEOUT_S = 10.0


class ExpertPeers:
    """What `join_expert_peers` returns; `close` when done.

    Attributes:
        world: all ranks.
        node: the ranks of this node.
        rail: the ranks of this rail (see rank_topology.py).
        shared: memory that the ranks of this node read from each other; None: there is none.
        streams: connections to the ranks of this rail; None: there is one level, which needs none.
        watch: looks after all waits of this rank for its peers.
    """

    def __init__(
        self,
        *,
        topology: RankTopology,
        groups: tuple[GlooPeers, GlooPeers, GlooPeers],
        shared: SharedBoxes | None,
        streams: PeerStreams | None,
        watch: PeerWatch,
        meeting: tuple[Store, float],
    ) -> None:
        self.topology = topology
        self.world, self.node, self.rail = groups
        self.shared = shared
        self.streams = streams
        self.watch = watch
        self._meeting: tuple[Store, float] | None = meeting

    @property
    def failure(self) -> PenstockError | None:
        """What has ended the groups; None while they work."""
        return self.watch.failure

    def on_failure(self, tell: Callable[[PenstockError, tuple[int, ...]], None]) -> None:
        """Call `tell` when the groups end by a fault, from the watch's thread, with who is lost.

        A rank may be in a wait that nothing but its own deadline ends; this does not wait for it.
        """

        def breaker() -> None:
            if self.watch.failure is not None:
                tell(self.watch.failure, self.watch.lost)

        self.watch.add_breaker(breaker)

    def join_segment(self, ranks: tuple[int, ...], num_bytes: int) -> NodeSegment:
        """Memory that some ranks of this node have in common; all of them call it.

        Args:
            ranks: this rank among them, ascending.

        Raises:
            InternalError: the groups have been left.
            Others as `join_node_segment`.
        """
        if self._meeting is None:
            raise InternalError("A rank that has left its groups cannot share memory.")
        keys, connect_s = self._meeting
        return join_node_segment(
            PrefixStore(f"segment/{ranks[0]}", keys),
            ranks.index(self.world.rank),
            [self.topology.describe(rank) for rank in ranks],
            self.watch,
            (num_bytes, connect_s),
        )

    def close(self) -> None:
        """Leave all groups; safe to call twice. Rank 0 takes the store with it."""
        self.watch.close()
        for group in (self.rail, self.node, self.world):
            group.close()
        if self.shared is not None:
            self.shared.close()
        if self.streams is not None:
            self.streams.close()
        self._meeting = None


def join_expert_peers(
    *,
    rank: int,
    topology: RankTopology,
    rendezvous: Rendezvous,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    bind_host: str | None = None,
) -> ExpertPeers:
    """Meet the other ranks; all call it with the same topology and rendezvous.

    Args:
        rank: this rank; rank 0 hosts the store at the rendezvous.
        topology: of all ranks.
        rendezvous: place, name and epoch of the group.
        timeout_s: how long a wait may last although all peers live.
        bind_host: this rank's own address; None means the one that faces the rendezvous.

    Raises:
        CollectiveTimeoutError: not all ranks came within `rendezvous.connect_timeout_s`.
        InternalError: rank 0 cannot listen at the rendezvous.
    """
    me = topology.describe(rank)
    watch: PeerWatch | None = None
    try:
        store = open_store(rank, rendezvous)
        keys = PrefixStore(rendezvous.prefix, store)
        keys.set_timeout(timedelta(seconds=rendezvous.connect_timeout_s))
        host = bind_host or local_address_towards(rendezvous.host, rendezvous.port)
        if rank == 0:
            keys.set("key", secrets.token_hex(16))
        watch = PeerWatch(
            rank=rank,
            topology=topology,
            host=host,
            key=keys.get("key").decode(),
            timeout_s=timeout_s,
        )
        _meet(watch, keys, rank, topology.num_ranks)
        groups = _groups(
            watch, keys, rank, topology, (host, rendezvous.connect_timeout_s, timeout_s)
        )
        mates = topology.node_ranks(rank)
        node_keys = PrefixStore(f"shared/{mates[0]}", keys)
        shared = join_shared_boxes(node_keys, mates, rank, watch, rendezvous.connect_timeout_s)
        streams = _streams(watch, keys, rank, topology, (host, rendezvous.connect_timeout_s))
    except (RuntimeError, OSError) as error:
        if watch is not None:
            watch.close()
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, OSError):
            remedy = "Choose another rendezvous address or port."
            raise InternalError(f"{me} could not join the group: {text}.", remedy) from error
        raise CollectiveTimeoutError(
            f"{me}: not all ranks joined within {rendezvous.connect_timeout_s:g} s ({text})."
        ) from error
    return ExpertPeers(
        topology=topology,
        groups=groups,
        shared=shared,
        streams=streams,
        watch=watch,
        meeting=(keys, rendezvous.connect_timeout_s),
    )


def _meet(watch: PeerWatch, keys: Store, rank: int, num_ranks: int) -> None:
    keys.set(f"watch/{rank}", json.dumps(watch.address))
    addresses = {}
    for other in range(num_ranks):
        host, port = json.loads(keys.get(f"watch/{other}"))
        addresses[other] = (str(host), int(port))
    watch.meet(addresses)


def _groups(
    watch: PeerWatch,
    keys: Store,
    rank: int,
    topology: RankTopology,
    setting: tuple[str, float, float],
) -> tuple[GlooPeers, GlooPeers, GlooPeers]:
    host, connect_s, timeout_s = setting
    members = {
        "world": tuple(range(topology.num_ranks)),
        "node": topology.node_ranks(rank),
        "rail": topology.rail_ranks(rank),
    }
    made: dict[tuple[int, ...], GlooPeers] = {}
    for name, ranks in members.items():
        if ranks not in made:  # with one node, or one rank a node, two of them are the same
            made[ranks] = GlooPeers(
                keys=PrefixStore(f"{name}/{ranks[0]}", keys),
                rank=rank,
                ranks=ranks,
                host=host,
                watch=watch,
                timeouts_s=(connect_s, timeout_s),
            )
    world, node, rail = (made[ranks] for ranks in members.values())
    return world, node, rail


def _streams(
    watch: PeerWatch,
    keys: Store,
    rank: int,
    topology: RankTopology,
    setting: tuple[str, float],
) -> PeerStreams | None:
    if not topology.has_two_levels:
        return None
    host, connect_s = setting
    ranks = topology.rail_ranks(rank)
    meeting = StreamsMeeting(
        keys=PrefixStore(f"streams/{ranks[0]}", keys),
        host=host,
        secret=keys.get("key").decode(),
        timeout_s=connect_s,
    )
    return join_peer_streams(meeting, ranks, rank, watch)
