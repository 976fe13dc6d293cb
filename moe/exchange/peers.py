"""The groups of a rank, as the exchanges see them (`cluster.dist.expert_peers.ExpertPeers`)."""

from __future__ import annotations

from typing import Protocol

from cluster.dist.peer_group import NodeMemory, PeerGroup, Streams


class Peers(Protocol):
    """Everybody, the rank's node and the rank's rail."""

    @property
    def world(self) -> PeerGroup:
        """All ranks."""
        ...

    @property
    def node(self) -> PeerGroup:
        """The ranks of this node."""
        ...

    @property
    def rail(self) -> PeerGroup:
        """The ranks of this rail."""
        ...

    @property
    def shared(self) -> NodeMemory | None:
        """Memory that the ranks of this node read from each other, if they can."""
        ...

    @property
    def streams(self) -> Streams | None:
        """Connections to the ranks of this rail; None with one level."""
        ...
