"""Memory that the ranks of one node read from each other, and notes that say what lies there.

A rank writes into boxes of its own and tells a peer where to look; the peer maps the box and reads
in place. So bytes inside a node are copied once, by who makes them, and a message is one system
call at each end, where a connection of the network stack copies twice and wakes a thread at both.

A box is anonymous memory (memfd) whose descriptor travels with the first note about it: it has no
name, is not bound by the size of /dev/shm, and ends with the processes that use it. A box that is
too small is replaced by a larger one. Notes travel over a socket per pair, which also ends every
wait when the peer ends.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import socket
import struct
import tempfile
from collections.abc import Mapping

import torch
from torch._C._distributed_c10d import Store

from cluster.dist.peer_group import Note
from cluster.dist.peer_watch import PeerWatch

_NOTE = struct.Struct("=4q")
_DESCRIPTOR = struct.Struct("=i")
_LEAST_BYTES = 64 * 1024
_NOBODY = "-"
_log = logging.getLogger(__name__)


class SharedBoxes:
    """Implements `NodeMemory` over unix sockets; `join_shared_boxes` connects them.

    Args:
        rank: this rank, as a member of the node.
        links: a connected SEQPACKET socket to every other member.
        watch: who names what goes wrong.
    """

    def __init__(self, rank: int, links: Mapping[int, socket.socket], watch: PeerWatch) -> None:
        self.rank = rank
        self.size = len(links) + 1
        self._links = dict(links)
        self._watch = watch
        self._own: dict[int, torch.Tensor] = {}
        self._descriptors: dict[int, int] = {}
        self._untold: dict[int, set[int]] = {}
        self._theirs: dict[tuple[int, int], torch.Tensor] = {}
        watch.add_breaker(self._break)

    def box(self, index: int, num_bytes: int) -> torch.Tensor:
        """See `NodeMemory.box`."""
        own = self._own.get(index)
        if own is None or own.numel() < num_bytes:
            own = self._replace(index, max(_LEAST_BYTES, num_bytes + num_bytes // 4))
        return own[:num_bytes]

    def tell(self, peer: int, index: int, note: Note) -> None:
        """See `NodeMemory.tell`."""
        data = _NOTE.pack(index, *note)
        try:
            if peer in self._untold[index]:
                self._untold[index].discard(peer)
                socket.send_fds(self._links[peer], [data], [self._descriptors[index]])
            else:
                self._links[peer].send(data)
        except OSError as error:
            # A note fits its socket, so sending is no wait; but the watch says what has happened.
            with self._watch.waiting("a note to a rank of its node"):
                raise RuntimeError(f"note to member {peer}: {error}") from error

    def hear(self, peer: int, what: str) -> tuple[torch.Tensor, Note]:
        """See `NodeMemory.hear`."""
        with self._watch.waiting(what):
            try:
                data, ancillary, _, _ = self._links[peer].recvmsg(
                    _NOTE.size, socket.CMSG_SPACE(_DESCRIPTOR.size)
                )
            except OSError as error:
                raise RuntimeError(f"note from member {peer}: {error}") from error
            if not data:
                raise RuntimeError(f"member {peer} has closed its connection")
        index, *note = _NOTE.unpack(data)
        if ancillary:
            (descriptor,) = _DESCRIPTOR.unpack(ancillary[0][2][: _DESCRIPTOR.size])
            self._theirs[peer, index] = mapped(descriptor)
            os.close(descriptor)
        return self._theirs[peer, index], (note[0], note[1], note[2])

    def close(self) -> None:
        """Let go of everything; safe to call twice. The watch must have been closed before."""
        for link in self._links.values():
            link.close()
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
        self._own.clear()
        self._theirs.clear()

    def _replace(self, index: int, num_bytes: int) -> torch.Tensor:
        if (former := self._descriptors.pop(index, None)) is not None:
            os.close(former)  # peers that have mapped it keep it
        descriptor = os.memfd_create("penstock-box")
        os.ftruncate(descriptor, num_bytes)
        self._descriptors[index] = descriptor
        self._untold[index] = set(self._links)
        self._own[index] = box = mapped(descriptor)
        return box

    def _break(self) -> None:
        for link in self._links.values():
            try:
                link.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # closed by the peer already


def join_shared_boxes(
    keys: Store, ranks: tuple[int, ...], rank: int, watch: PeerWatch, connect_timeout_s: float
) -> SharedBoxes | None:
    """Connect the ranks of a node; None if one of them cannot, or is alone, the same at all.

    Args:
        keys: where they meet; unique to the node and epoch.
        ranks: the node's, `rank` among them.
    """
    me, size = ranks.index(rank), len(ranks)
    if size == 1:
        return None
    links: dict[int, socket.socket] = {}
    outcome = ""
    try:
        connect_members(keys, me, size, connect_timeout_s, links)
    except (OSError, AttributeError) as error:  # AttributeError: not a Linux
        outcome = f"rank {rank}: {error}"
    keys.set(f"outcome/{me}", outcome or "connected")
    outcomes = [keys.get(f"outcome/{peer}").decode() for peer in range(size)]
    if failed := [text for text in outcomes if text != "connected"]:
        for link in links.values():
            link.close()
        _log.warning("no shared memory inside the node: %s", "; ".join(failed))
        return None
    return SharedBoxes(me, links, watch)


def connect_members(
    keys: Store, me: int, size: int, timeout_s: float, links: dict[int, socket.socket]
) -> None:
    """Connect a member of a node to those before, and from those after; to nobody if one cannot
    listen. All call it.

    Args:
        links: filled with a SEQPACKET socket for each other member.

    Raises:
        OSError: a member cannot listen, or did not come in time.
        AttributeError: not a Linux.
    """
    with contextlib.ExitStack() as cleanup:
        try:
            os.close(os.memfd_create("penstock-box"))
            # Nobody else may enter the folder.
            path = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="penstock-")) + "/notes"
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            cleanup.enter_context(listener)
            listener.bind(path)
            listener.listen(size)
        except (OSError, AttributeError):
            path = ""
            raise
        finally:
            keys.set(f"path/{me}", path or _NOBODY)
        paths = [keys.get(f"path/{peer}").decode() for peer in range(size)]
        if _NOBODY in paths:
            raise OSError(f"member {paths.index(_NOBODY)} cannot listen")
        # Half of what the others wait for the outcome.
        listener.settimeout(timeout_s / 2)
        for peer in range(me):
            links[peer] = _called(paths[peer], me)
        for _ in range(me + 1, size):
            link, _ = listener.accept()
            link.setblocking(True)
            links[link.recv(1)[0]] = link


def _called(path: str, me: int) -> socket.socket:
    link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        link.connect(path)
        link.send(bytes([me]))
    except OSError:
        link.close()
        raise
    return link


def mapped(descriptor: int) -> torch.Tensor:
    """All bytes behind a descriptor, uint8, shared with who else maps them."""
    memory = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
    with torch.inference_mode(False):  # written inside a step and outside of one
        return torch.frombuffer(memory, dtype=torch.uint8)
