"""Frames over a stream socket: a 5-byte header (length, kind) and a payload.

The same on unix sockets (within a node) and TCP (between nodes). A stream with our own framing
rather than SEQPACKET: the end of a peer is seen just as fast (EOF), and a long prompt is not bound
by the kernel's packet size. Blocking calls only, each with a deadline; nothing spins.
"""

from __future__ import annotations

import contextlib
import enum
import socket
import struct
import time
from dataclasses import dataclass

_HEADER = struct.Struct("<IB")
_MAX_FRAME_BYTES = 1 << 30


class FrameKind(enum.IntEnum):
    """What a frame carries."""

    HELLO = 1
    PLAN = 2
    RESULT = 3
    FAULT = 4
    STOP = 5
    NEARLY_DONE = 6
    """Rank 0 has run the layers of a step and begins to sample; no payload."""


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

    def skip(self, kind: FrameKind) -> bool:
        """Take an empty frame of this kind off the socket if it comes next; never waits."""
        header = _HEADER.pack(0, kind)
        self._sock.settimeout(0.0)
        try:
            found = self._sock.recv(_HEADER.size, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        if found != header:
            return False
        self._read(_HEADER.size, deadline=None)
        return True

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
