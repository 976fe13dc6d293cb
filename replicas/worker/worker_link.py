"""The step channel: one framed stream socket between the leader and each worker.

Unix sockets on a node, TCP between nodes, the same frames on both: a 5-byte header (length, kind)
and a payload. A stream with our own framing rather than SEQPACKET: the end of a peer is seen
just as fast (EOF), and a long prompt is not bound by the kernel's packet size. Blocking calls only,
each with a deadline; nothing spins. Ray is not involved: a step costs two system calls a worker.
"""

from __future__ import annotations

import contextlib
import enum
import hmac
import os
import select
import socket
import struct
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from cluster.base.errors import (
    CollectiveTimeoutError,
    InternalError,
    PenstockError,
    WorkerDiedError,
    error_from_dict,
)
from replicas.worker import wire

_HEADER = struct.Struct("<IB")
_MAX_FRAME_BYTES = 1 << 30


class FrameKind(enum.IntEnum):
    """What a frame carries."""

    HELLO = 1
    PLAN = 2
    RESULT = 3
    FAULT = 4
    STOP = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkAddress:
    """Where a leader listens: a unix socket path, or host and port."""

    path: str = ""
    host: str = ""
    port: int = 0


class FrameSocket:
    """Frames over a connected stream socket; one reader and one writer at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        if sock.family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def fileno(self) -> int:
        """For `select`."""
        return self._sock.fileno()

    def send(self, kind: FrameKind, payload: bytes, timeout_s: float) -> None:
        """Send one frame.

        Raises:
            ConnectionError: the peer is gone.
            TimeoutError: the peer did not take the bytes in time.
        """
        self._sock.settimeout(timeout_s)
        self._sock.sendall(_HEADER.pack(len(payload), kind) + payload)

    def receive(self, timeout_s: float | None) -> tuple[FrameKind, bytearray]:
        """Receive one frame; None waits until the peer speaks or goes.

        Raises:
            ConnectionError: the peer is gone, or sent something that is no frame.
            TimeoutError: nothing complete arrived in time.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        length, kind = _HEADER.unpack(self._read(_HEADER.size, deadline))
        if length > _MAX_FRAME_BYTES or kind not in FrameKind._value2member_map_:
            raise ConnectionError(f"not a frame: kind {kind}, {length} bytes")
        return FrameKind(kind), self._read(length, deadline)

    def close(self) -> None:
        """Shut both directions, waking whoever reads; safe to call twice."""
        with contextlib.suppress(OSError):  # the peer may have been faster
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _read(self, size: int, deadline: float | None) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            if deadline is None:
                self._sock.settimeout(None)
            else:
                self._sock.settimeout(max(1e-4, deadline - time.monotonic()))
            count = self._sock.recv_into(view)
            if count == 0:
                raise ConnectionResetError("the peer closed the link")
            view = view[count:]
        return data


class LinkListener:
    """The leader's end before its workers have joined."""

    def __init__(self, *, size: int, epoch: str, secret: str, host: str | None = None) -> None:
        """Listen for `size` workers; on `host` over TCP, or on a private unix socket if None."""
        self._size = size
        self._epoch = epoch
        self.secret = secret
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if host is None:
            self._folder = tempfile.TemporaryDirectory(prefix="penstock-link-")
            path = str(Path(self._folder.name) / "leader.sock")
            self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._sock.bind(path)
            os.chmod(path, 0o600)
            self.address = LinkAddress(path=path)
        else:
            self._sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            self._sock.bind((host, 0))
            self.address = LinkAddress(host=host, port=self._sock.getsockname()[1])
        self._sock.listen(size)

    def accept_all(self, timeout_s: float) -> LeaderLink:
        """Wait until every rank has said hello, then give the link.

        A connection that does not know the secret or belongs to another epoch is dropped.

        Raises:
            CollectiveTimeoutError: ranks are missing at the deadline; names them.
        """
        deadline = time.monotonic() + timeout_s
        peers: dict[int, FrameSocket] = {}
        while len(peers) < self._size:
            self._sock.settimeout(max(1e-3, deadline - time.monotonic()))
            try:
                connection, _ = self._sock.accept()
            except TimeoutError:
                missing = sorted(set(range(self._size)) - set(peers))
                for peer in peers.values():
                    peer.close()
                raise CollectiveTimeoutError(
                    f"Worker ranks {missing} did not connect within {timeout_s:.0f} s.",
                    "See their logs in the Ray dashboard.",
                ) from None
            peer = FrameSocket(connection)
            rank = self._greet(peer)
            if rank is None or rank in peers:
                peer.close()
            else:
                peers[rank] = peer
        return LeaderLink([peers[rank] for rank in range(self._size)])

    def close(self) -> None:
        """Stop listening; an accepted link stays open."""
        self._sock.close()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _greet(self, peer: FrameSocket) -> int | None:
        try:
            kind, payload = peer.receive(timeout_s=5.0)
            hello = wire.decode_hello(payload)
        except (OSError, InternalError):
            return None
        trusted = hmac.compare_digest(hello.secret, self.secret) and hello.epoch == self._epoch
        return hello.rank if kind is FrameKind.HELLO and trusted else None


class LeaderLink:
    """The leader's end: plans out to all ranks, results back from rank 0, faults from any."""

    def __init__(self, peers: list[FrameSocket]) -> None:
        self._peers = peers
        self._rank_of = {peer.fileno(): rank for rank, peer in enumerate(peers)}
        self._poll = select.poll()
        for peer in peers:
            self._poll.register(peer.fileno(), select.POLLIN)

    def send_plan(self, payload: bytes, timeout_s: float) -> None:
        """Send one encoded plan to every rank.

        Raises:
            WorkerDiedError: a rank's socket is closed.
            CollectiveTimeoutError: a rank does not read.
        """
        for rank, peer in enumerate(self._peers):
            try:
                peer.send(FrameKind.PLAN, payload, timeout_s)
            except TimeoutError:
                raise CollectiveTimeoutError(
                    f"Worker rank {rank} did not take the step plan within {timeout_s:.0f} s."
                ) from None
            except OSError as error:
                raise self._last_words(rank) from error

    def receive_result(self, timeout_s: float) -> bytearray:
        """The next result of rank 0, while watching every rank.

        Raises:
            WorkerDiedError: a rank's socket closed.
            CollectiveTimeoutError: nothing within `timeout_s` seconds.
            PenstockError: the root cause that a failing rank reported.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = deadline - time.monotonic()
            ready = self._poll.poll(max(0.0, left_s) * 1e3)
            if not ready:
                raise CollectiveTimeoutError(
                    f"The workers did not finish a step within {timeout_s:.1f} s.",
                    "A rank may be stopped or its machine overloaded; "
                    "raise limits.step_timeout if steps are really that long.",
                )
            # Rank 0 last: a fault elsewhere explains a missing or broken result.
            for fd, _ in sorted(ready, key=lambda item: -self._rank_of[item[0]]):
                payload = self._read_from(self._rank_of[fd])
                if payload is not None:
                    return payload

    def stop(self) -> None:
        """Ask every rank to leave its loop, then close."""
        for peer in self._peers:
            try:
                peer.send(FrameKind.STOP, b"", timeout_s=1.0)
            except OSError:
                continue  # that rank is already gone
        self.close()

    def close(self) -> None:
        """Close all sockets: the workers see EOF and exit."""
        for peer in self._peers:
            peer.close()

    def _read_from(self, rank: int) -> bytearray | None:
        try:
            kind, payload = self._peers[rank].receive(timeout_s=10.0)
        except OSError as error:
            raise WorkerDiedError(
                f"Worker rank {rank} of {len(self._peers)} is gone ({error}).",
                "The replica restarts by itself; retry the request.",
            ) from error
        if kind is FrameKind.FAULT:
            raise _error_of(payload)
        return payload if kind is FrameKind.RESULT else None

    def _last_words(self, rank: int) -> PenstockError:
        """Why a rank is gone: its fault report if one is in the socket, else that it died."""
        try:
            while True:
                kind, payload = self._peers[rank].receive(timeout_s=0.05)
                if kind is FrameKind.FAULT:
                    return _error_of(payload)
        except OSError:
            return WorkerDiedError(
                f"Worker rank {rank} of {len(self._peers)} is gone.",
                "The replica restarts by itself; retry the request.",
            )


class WorkerLink:
    """A worker's end."""

    def __init__(self, sock: FrameSocket, rank: int) -> None:
        self._sock = sock
        self._rank = rank

    @classmethod
    def connect(
        cls, address: LinkAddress, *, rank: int, epoch: str, secret: str, timeout_s: float
    ) -> WorkerLink:
        """Join the leader at `address`.

        Raises:
            WorkerDiedError: the leader cannot be reached.
        """
        family = socket.AF_UNIX if address.path else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.settimeout(timeout_s)
        try:
            sock.connect(address.path if address.path else (address.host, address.port))
            frames = FrameSocket(sock)
            hello = wire.Hello(rank=rank, epoch=epoch, secret=secret)
            frames.send(FrameKind.HELLO, wire.encode(hello), timeout_s)
        except OSError as error:
            raise WorkerDiedError(f"Rank {rank} cannot reach its leader: {error}.") from error
        return cls(frames, rank)

    def receive_plan(self) -> bytearray | None:
        """The next plan's bytes; None when the leader said stop or is gone."""
        try:
            kind, payload = self._sock.receive(timeout_s=None)
        except OSError:
            return None
        return payload if kind is FrameKind.PLAN else None

    def send_result(self, payload: bytes) -> None:
        """Send an encoded result; raises OSError when the leader is gone."""
        self._sock.send(FrameKind.RESULT, payload, timeout_s=30.0)

    def send_fault(self, error: dict[str, str | None]) -> None:
        """Tell the leader why this rank is about to end; best effort."""
        fault = wire.Fault(rank=self._rank, error=error)
        with contextlib.suppress(OSError):  # a leader that is gone will not miss it
            self._sock.send(FrameKind.FAULT, wire.encode(fault), timeout_s=2.0)

    def close(self) -> None:
        """Close this end; safe to call twice."""
        self._sock.close()


def _error_of(payload: bytearray) -> PenstockError:
    """The error a rank reported, with the rank in its cause."""
    fault = wire.decode_fault(payload)
    fields = dict(fault.error)
    fields["cause"] = f"Worker rank {fault.rank}: {fields.get('cause')}"
    return error_from_dict(fields)
