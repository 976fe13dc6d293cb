"""One piece of memory that some ranks of a node write and read together, and notes between them.

The first member makes it, anonymous memory (memfd) of a size that all know beforehand, and hands
its descriptor to the others, so that it has no name and ends with the processes that use it. Who
may write what and when is agreed on by notes: three numbers over a socket per pair, which also ends
every wait when the peer ends.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta

import torch
from torch._C._distributed_c10d import Store

from cluster.base.errors import ConfigError, InternalError
from cluster.dist.peer_group import Note
from cluster.dist.peer_watch import PeerWatch
from cluster.dist.shared_boxes import connect_members, mapped

PREPARATION_S = 24 * 3600.0
"""Members may first have work to do that takes one longer than another, such as packing weights;
one that dies meanwhile is the leader's to notice."""
_NOTE = struct.Struct("=3q")


class NodeSegment:
    """The memory at one member; `join_node_segment` makes it.

    Args:
        rank: this member's index.
        names: what errors call the members.
        memory: the same for all of them; uint8.
        links: a connected SEQPACKET socket to every other member.
        watch: who names what goes wrong.
    """

    def __init__(
        self,
        rank: int,
        names: Sequence[str],
        memory: torch.Tensor,
        links: Mapping[int, socket.socket],
        watch: PeerWatch,
    ) -> None:
        self.rank = rank
        self.names = tuple(names)
        self.memory = memory
        self._links = dict(links)
        self._watch = watch
        watch.add_breaker(self._break)

    def tell(self, note: Note) -> None:
        """Say something to all others, from any thread; who is gone is noticed by who waits."""
        data = _NOTE.pack(*note)
        for link in self._links.values():
            with suppress(OSError):
                link.send(data)

    def hear(self, peer: int, what: str) -> Note:
        """Wait for another member's next note; notes arrive in the order told.

        Raises:
            WorkerDiedError, CollectiveTimeoutError: it is lost, or lives and does not say anything.
        """
        with self._watch.waiting(what):
            try:
                data = self._links[peer].recv(_NOTE.size)
            except OSError as error:
                raise RuntimeError(f"note from {self.names[peer]}: {error}") from error
            if not data:
                raise RuntimeError(f"{self.names[peer]} has closed its connection")
        first, second, third = _NOTE.unpack(data)
        return first, second, third

    def close(self) -> None:
        """Leave; safe to call twice. The memory stays as long as somebody looks at it."""
        for link in self._links.values():
            link.close()

    def _break(self) -> None:
        for link in self._links.values():
            with suppress(OSError):  # closed by the peer already
                link.shutdown(socket.SHUT_RDWR)


def join_node_segment(
    keys: Store, rank: int, names: Sequence[str], watch: PeerWatch, size: tuple[int, float]
) -> NodeSegment:
    """Make the segment with the other members; all call it.

    Args:
        keys: where they meet; unique to the members and epoch.
        rank: this member's index.
        names: of all members, in order.
        size: bytes of the segment, and seconds that connecting may take once all are there.

    Raises:
        ConfigError: they cannot share memory, said by all of them.
        CollectiveTimeoutError, WorkerDiedError: a member is lost.
        InternalError: another member wants another size.
    """
    num_bytes, connect_s = size
    keys.set_timeout(timedelta(seconds=PREPARATION_S))
    keys.set(f"here/{rank}", "")
    keys.wait([f"here/{peer}" for peer in range(len(names))])
    keys.set_timeout(timedelta(seconds=connect_s))
    links: dict[int, socket.socket] = {}
    outcome = ""
    try:
        connect_members(keys, rank, len(names), connect_s, links)
    except (OSError, AttributeError) as error:  # AttributeError: not a Linux
        outcome = f"{names[rank]}: {error}"
    keys.set(f"outcome/{rank}", outcome or "connected")
    outcomes = [keys.get(f"outcome/{peer}").decode() for peer in range(len(names))]
    if failed := [text for text in outcomes if text != "connected"]:
        for link in links.values():
            link.close()
        raise ConfigError(
            f"Ranks of one node cannot share memory ({'; '.join(failed)}), and data-parallel ranks "
            "that stream a model hold it there once.",
            "Let them share /tmp and map each other's descriptors, or leave parallel.dp out.",
        )
    descriptor = _share(rank, links, num_bytes, watch)
    try:
        memory = mapped(descriptor)[:num_bytes]
    finally:
        os.close(descriptor)
    return NodeSegment(rank, names, memory, links, watch)


def _share(rank: int, links: Mapping[int, socket.socket], num_bytes: int, watch: PeerWatch) -> int:
    """The descriptor of the memory: made by the first member, received by the others."""
    if rank == 0:
        descriptor = os.memfd_create("penstock-weights")
        os.ftruncate(descriptor, max(1, num_bytes))
        for link in links.values():
            socket.send_fds(link, [_NOTE.pack(num_bytes, 0, 0)], [descriptor])
        return descriptor
    with watch.waiting("the memory that ranks of a node share"):
        data, descriptors, _, _ = socket.recv_fds(links[0], _NOTE.size, 1)
        if not data or not descriptors:
            raise RuntimeError("the first rank of the node gave no memory")
    if (theirs := _NOTE.unpack(data)[0]) != num_bytes:
        raise InternalError(f"Ranks of a node want to share {theirs} and {num_bytes} bytes.")
    return descriptors[0]
