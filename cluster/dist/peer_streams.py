"""A connection to each of some ranks, over which messages go out without being asked for.

gloo sends once it knows of the receive, and hands every message to a thread of its own. Here a
message is a header and bytes on a TCP connection: one system call puts it into the system's buffer,
one delay later it is there, and the thread that needs it reads it to where it belongs. What does
not fit the buffer is sent on by a thread, one per connection and only from then on, so nobody has
to read before they have written.

    | three numbers of the caller's, bytes that follow: int64 each | the bytes |
"""

from __future__ import annotations

import contextlib
import hmac
import json
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch._C._distributed_c10d import Store

from cluster.base.errors import InternalError
from cluster.dist.peer_group import Note
from cluster.dist.peer_watch import PeerWatch

_HEADER = struct.Struct("=4q")
_MEMBER = struct.Struct("=i")
_HELLO_TIMEOUT_S = 5.0


class PeerStreams:
    """Implements `Streams` over TCP; `join_peer_streams` connects them.

    Args:
        rank: this rank, as a member.
        links: a connected socket to every other member.
        watch: who names what goes wrong.
    """

    def __init__(self, rank: int, links: Mapping[int, socket.socket], watch: PeerWatch) -> None:
        self.rank = rank
        self.size = len(links) + 1
        self._links = dict(links)
        self._watch = watch
        self._rests: dict[int, _Rest] = {}
        watch.add_breaker(self._break)

    def send(self, peer: int, note: Note, data: torch.Tensor) -> None:
        """See `Streams.send`."""
        self._watch.check()
        content = data.numpy().data
        message = [memoryview(_HEADER.pack(*note, len(content))), content]
        rest = self._rests.get(peer)
        if rest is None or rest.is_sent:
            try:
                num_sent = self._links[peer].sendmsg(message, (), socket.MSG_DONTWAIT)
            except BlockingIOError:
                num_sent = 0
            except OSError as error:
                with self._watch.waiting("a message along the rail"):
                    raise RuntimeError(f"message to member {peer}: {error}") from error
            message = _without(message, num_sent)
        if message:
            if rest is None:
                rest = self._rests[peer] = _Rest(self._links[peer])
            rest.put(message)

    def receive(self, peer: int, place: Callable[[Note], torch.Tensor], what: str) -> None:
        """See `Streams.receive`."""
        with self._watch.waiting(what):
            header = bytearray(_HEADER.size)
            self._fill(peer, memoryview(header))
        *note, num_bytes = _HEADER.unpack(header)
        into = place((note[0], note[1], note[2])).numpy().data
        if len(into) != num_bytes:
            raise InternalError(f"{num_bytes} bytes of member {peer} do not fill {len(into)}.")
        if num_bytes:
            with self._watch.waiting(what):
                self._fill(peer, into)

    def close(self) -> None:
        """Let go of the connections; safe to call twice. The watch must have been closed before."""
        self._break()
        for rest in self._rests.values():
            rest.end()
        self._rests.clear()
        for link in self._links.values():
            link.close()

    def _fill(self, peer: int, into: memoryview) -> None:
        done = 0
        while done < len(into):
            try:
                count = self._links[peer].recv_into(into[done:], 0, socket.MSG_WAITALL)
            except OSError as error:
                raise RuntimeError(f"message from member {peer}: {error}") from error
            if not count:
                raise RuntimeError(f"member {peer} has closed its connection")
            done += count

    def _break(self) -> None:
        for link in self._links.values():
            with contextlib.suppress(OSError):  # closed by the peer, or by us before
                link.shutdown(socket.SHUT_RDWR)


class _Rest:
    """Sends what one connection did not take at once, in order, from a thread."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._messages: queue.Queue[list[memoryview]] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="peer-stream", daemon=True)
        self._thread.start()

    @property
    def is_sent(self) -> bool:
        """Whether nothing is left, so that the next message may go straight out."""
        return not self._messages.unfinished_tasks

    def put(self, message: list[memoryview]) -> None:
        """More to send."""
        self._messages.put(message)

    def end(self) -> None:
        """After the connection has been shut down."""
        self._messages.put([])
        self._thread.join()

    def _run(self) -> None:
        # Whoever waits for this peer finds out what is wrong with it.
        with contextlib.suppress(OSError):
            while message := self._messages.get():
                while message:
                    message = _without(message, self._link.sendmsg(message))
                self._messages.task_done()


def _without(message: Sequence[memoryview], num_bytes: int) -> list[memoryview]:
    """What is left of a message after its first bytes; empty if that is all."""
    rest = []
    for part in message:
        skipped = min(num_bytes, len(part))
        num_bytes -= skipped
        if skipped < len(part):
            rest.append(part[skipped:])
    return rest


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamsMeeting:
    """How some ranks find each other, and whom they let in."""

    keys: Store
    """Unique to the members and epoch."""
    host: str
    """This rank's own address."""
    secret: str
    """Known to the members of this epoch alone; who does not say it is not let in."""
    timeout_s: float
    """For all to come."""


def join_peer_streams(
    meeting: StreamsMeeting, ranks: tuple[int, ...], rank: int, watch: PeerWatch
) -> PeerStreams:
    """Connect some ranks with each other; all of them call it.

    Args:
        meeting: the same for all, but for the address.
        ranks: the members, `rank` among them.
        watch: see `PeerStreams`.

    Raises:
        RuntimeError: not all members came in time.
    """
    me, size = ranks.index(rank), len(ranks)
    keys, secret = meeting.keys, meeting.secret
    give_up_s = time.monotonic() + meeting.timeout_s
    links: dict[int, socket.socket] = {}
    try:
        with socket.create_server((meeting.host, 0), backlog=size) as listener:
            keys.set(f"address/{me}", json.dumps(listener.getsockname()[:2]))
            for peer in range(me):
                address = json.loads(keys.get(f"address/{peer}"))
                links[peer] = _called(address, me, secret, give_up_s)
            while len(links) < size - 1:
                _answer(listener, links, range(me + 1, size), secret, give_up_s)
    except OSError as error:
        for link in links.values():
            link.close()
        missing = [ranks[peer] for peer in range(size) if peer not in (*links, me)]
        raise RuntimeError(f"no connection to ranks {missing}: {error}") from error
    for link in links.values():
        link.settimeout(None)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return PeerStreams(me, links, watch)


def _called(address: tuple[str, int], me: int, secret: str, give_up_s: float) -> socket.socket:
    host, port = address
    link = socket.create_connection((host, port), timeout=_left(give_up_s))
    try:
        link.sendall(secret.encode() + _MEMBER.pack(me))
    except OSError:
        link.close()
        raise
    return link


def _answer(
    listener: socket.socket,
    links: dict[int, socket.socket],
    expected: range,
    secret: str,
    give_up_s: float,
) -> None:
    """Take in one caller, if it is a member that is not here yet."""
    listener.settimeout(_left(give_up_s))
    link, _ = listener.accept()
    link.settimeout(min(_HELLO_TIMEOUT_S, _left(give_up_s)))
    said = b""
    with contextlib.suppress(OSError):  # a stranger that says nothing keeps nobody out
        said = link.recv(len(secret) + _MEMBER.size, socket.MSG_WAITALL)
    known, member = said[: len(secret)], said[len(secret) :]
    if hmac.compare_digest(known, secret.encode()) and len(member) == _MEMBER.size:
        (peer,) = _MEMBER.unpack(member)
        if peer in expected and peer not in links:
            links[peer] = link
            return
    link.close()


def _left(give_up_s: float) -> float:
    left_s = give_up_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("not all came in time")
    return left_s
