"""Frames over a stream socket: a 5-byte header (length, kind) and a payload.

The same on unix sockets (within a node) and TCP (between nodes). A stream with our own framing
rather than SEQPACKET: the end of a peer is seen just as fast (EOF), and a long prompt is not bound
by the kernel's packet size. Blocking calls only, each with a deadline; nothing spins.
"""

from __future__ import annotations

import contextlib
import enum
import select
import socket
import struct
import time
from dataclasses import dataclass
from typing import TypeAlias

_HEADER = struct.Struct("<IB")
_MAX_FRAME_BYTES = 1 << 30
_READ_AHEAD_BYTES = 1 << 16
_LARGEST_READ_BYTES = 1 << 20

Payload: TypeAlias = bytes | bytearray


class FrameKind(enum.IntEnum):
    """What a frame carries."""

    HELLO = 1
    PLAN = 2
    RESULT = 3
    FAULT = 4
    STOP = 5
    NEARLY_DONE = 6
    """Rank 0 has run the layers of a step and begins to sample; no payload."""
    HALT = 7
    """To a rank: leave your groups; plans that you have not run are void. No payload."""
    HALTED = 8
    """A rank has; whatever it says from now on is not of the epoch that ended. No payload."""
    GATHER = 9
    """To a rank that has halted or was never in a group: who is in the next one, and where."""
    GATHERED = 10
    """A rank is in it."""


# What every step has: an enumeration looks each of its names up by a function of Python's.
PLAN, RESULT, STOP, NEARLY_DONE = (
    FrameKind.PLAN,
    FrameKind.RESULT,
    FrameKind.STOP,
    FrameKind.NEARLY_DONE,
)
_KINDS = {kind.value: kind for kind in FrameKind}


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkAddress:
    """Where a leader listens: a unix socket path, or host and port."""

    path: str = ""
    host: str = ""
    port: int = 0


class FrameSocket:
    """Frames over a connected stream socket; one reader and one writer at a time.

    The socket stays blocking and every call asks the kernel not to wait: a frame then mostly costs
    one system call, where Python's own timeouts poll before each and switch the socket's mode
    between readers and writers of different patience.
    """

    def __init__(self, sock: socket.socket, *, reads_ahead: bool = False) -> None:
        """`reads_ahead`: take whatever has arrived with one call; not for who polls `fileno`."""
        self._sock = sock
        self._unread = bytearray()
        self._at_once = _READ_AHEAD_BYTES if reads_ahead else 0
        sock.settimeout(None)
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
        data = _HEADER.pack(len(payload), kind) + payload
        try:
            sent = self._sock.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            sent = 0
        if sent == len(data):
            return
        deadline_s = time.monotonic() + timeout_s
        view = memoryview(data)[sent:]
        while view:
            self._wait(select.POLLOUT, deadline_s)
            with contextlib.suppress(BlockingIOError):
                view = view[self._sock.send(view, socket.MSG_DONTWAIT) :]

    def receive(self, timeout_s: float | None) -> tuple[FrameKind, Payload]:
        """Receive one frame; None waits until the peer speaks or goes.

        Raises:
            ConnectionError: the peer is gone, or sent something that is no frame.
            TimeoutError: nothing complete arrived in time.
        """
        if timeout_s is None and self._at_once and not self._unread:
            # A rank's next plan, which mostly is there, whole and alone: each call that is saved
            # here saves microseconds, because a step's weights have swept the caches.
            data = self._sock.recv(self._at_once)
            if len(data) >= _HEADER.size:
                length, number = _HEADER.unpack_from(data)
                if len(data) == _HEADER.size + length and (known := _KINDS.get(number)):
                    return known, data[_HEADER.size :]
            elif not data:
                raise ConnectionResetError("the peer closed the link")
            self._unread += data
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        length, number = _HEADER.unpack(self._read(_HEADER.size, deadline_s))
        kind = _KINDS.get(number)
        if length > _MAX_FRAME_BYTES or kind is None:
            raise ConnectionError(f"not a frame: kind {number}, {length} bytes")
        return kind, self._read(length, deadline_s)

    def is_readable(self) -> bool:
        """Whether bytes, or the peer's end, are there; never waits."""
        poll = select.poll()
        poll.register(self._sock.fileno(), select.POLLIN)
        return bool(self._unread) or bool(poll.poll(0))

    def skip(self, kind: FrameKind) -> bool:
        """Take an empty frame of this kind off the socket if it comes next; never waits."""
        header = _HEADER.pack(0, kind)
        try:
            found = self._sock.recv(_HEADER.size, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        if found != header:
            return False
        self._read(_HEADER.size, deadline_s=None)
        return True

    def close(self) -> None:
        """Shut both directions, waking whoever reads; safe to call twice."""
        with contextlib.suppress(OSError):  # the peer may have been faster
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _read(self, size: int, deadline_s: float | None) -> bytearray:
        unread = self._unread
        while len(unread) < size:
            unread += self._receive_some(max(size - len(unread), self._at_once), deadline_s)
        if len(unread) == size:
            self._unread = bytearray()
            return unread
        data = unread[:size]
        del unread[:size]
        return data

    def _receive_some(self, at_most: int, deadline_s: float | None) -> bytes:
        at_most = min(at_most, _LARGEST_READ_BYTES)
        if deadline_s is None:
            data = self._sock.recv(at_most)
        else:
            try:
                data = self._sock.recv(at_most, socket.MSG_DONTWAIT)
            except BlockingIOError:
                self._wait(select.POLLIN, deadline_s)
                data = self._sock.recv(at_most)
        if not data:
            raise ConnectionResetError("the peer closed the link")
        return data

    def _wait(self, event: int, deadline_s: float) -> None:
        left_s = deadline_s - time.monotonic()
        poll = select.poll()
        poll.register(self._sock.fileno(), event)
        if not poll.poll(max(0.0, left_s) * 1e3):
            raise TimeoutError("the peer did not keep the deadline")
