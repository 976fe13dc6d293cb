"""How the ranks of a probe agree on numbers: the largest of all, at everybody, in few delays."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from cluster.base.errors import InternalError
from cluster.dist.peer_group import Note, PeerGroup, Streams
from moe.exchange.peers import Peers

_WHAT = "calibration"
_NUMBERS = 2
"""The kind of a message on a stream; rows and answers of layers have others (stream_hop.py)."""


class Meeting:
    """Where one rank agrees with the others; all ranks call the same in the same order.

    Within the node and then along the rail, which has a rank of every node: on a network that is
    slow to answer this is one delay over streams and two without, where a ring over all ranks takes
    many.
    """

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self.took_s = 0.0
        """The last meeting of all ranks."""
        self.ended_s = 0.0
        """When that ended, on this rank's clock."""

    def largest(self, own: Sequence[float]) -> list[float]:
        """The largest of all ranks' numbers, each, at all of them."""
        began_s = time.perf_counter()
        peers = self._peers
        numbers = self.largest_of_node(own)
        if peers.rail.size > 1:
            everybodys = (
                _asked(peers.rail, numbers)
                if peers.streams is None
                else _sent(peers.rail, peers.streams, numbers)
            )
            numbers = everybodys.amax(dim=0).tolist()
        self.ended_s = time.perf_counter()
        self.took_s = self.ended_s - began_s
        return numbers

    def largest_of_node(self, own: Sequence[float]) -> list[float]:
        """The same within the node, which asks no other."""
        node = self._peers.node
        if node.size == 1:
            return list(own)
        numbers: list[float] = _asked(node, own).amax(dim=0).tolist()
        return numbers


def _asked(group: PeerGroup, own: Sequence[float]) -> torch.Tensor:
    """Everybody's numbers by a collective: (members, numbers) fp64."""
    own_N = torch.tensor(own, dtype=torch.float64)
    sent = own_N.repeat(group.size).view(torch.uint8)
    received = torch.empty_like(sent)
    splits = [own_N.nbytes] * group.size
    group.all_to_all(received, sent, splits, splits).wait(_WHAT)
    return received.view(torch.float64).view(group.size, -1)


def _sent(group: PeerGroup, streams: Streams, own: Sequence[float]) -> torch.Tensor:
    """The same over streams, where nobody has to be asked first."""
    own_N = torch.tensor(own, dtype=torch.float64)
    received_MN = own_N.repeat(group.size, 1)
    steps = range(1, group.size)
    for step in steps:
        note = (_NUMBERS, own_N.numel(), 0)
        streams.send((group.rank + step) % group.size, note, own_N.view(torch.uint8))
    for step in steps:
        peer = (group.rank - step) % group.size
        streams.receive(peer, _place(received_MN[peer].view(torch.uint8)), _WHAT)
    return received_MN


def _place(into: torch.Tensor) -> Callable[[Note], torch.Tensor]:
    def place(note: Note) -> torch.Tensor:
        if note[0] != _NUMBERS:
            raise InternalError(f"A message of kind {note[0]} came in {_WHAT}.")
        return into

    return place
