"""The least of an HTTP/2 client that server-streaming gRPC calls need: one socket, no library.

For the load generator alone: it shares the machine with what it measures, and a message costs it a
few microseconds where a full client's threads and loop cost ten times as much. It keeps the
server's send window, answers its settings and pings, and reads no headers: how a call ended is
judged by what it delivered.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections import deque
from typing import cast

Arrival = tuple[float, bytes]
"""When a message came (`time.perf_counter`) and its bytes."""

Answer = tuple[list[Arrival], float]
"""Every message, and when the end came."""

_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _ACK, _END_HEADERS, _PADDED = 0x1, 0x1, 0x4, 0x8
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DEFAULT_WINDOW = 65_535
_LARGEST_WINDOW = 2**31 - 1
_MAX_FRAME = 16_384
_FRAME_HEADER = 9
_GRPC_HEADER = 5


class StreamingClient(asyncio.Protocol):
    """Calls over one connection."""

    def __init__(self, authority: str) -> None:
        self._authority = authority
        self._transport: asyncio.Transport | None = None
        self._calls: dict[int, asyncio.Future[Answer]] = {}
        self._arrivals: dict[int, list[Arrival]] = {}
        self._partial: dict[int, bytes] = {}
        self._next_id = 1
        self._unread = b""
        self._window = _DEFAULT_WINDOW
        self._unsent: deque[tuple[int, str, bytes]] = deque()

    @classmethod
    async def connect(cls, target: str) -> StreamingClient:
        """A client of `host:port`."""
        host, _, port = target.rpartition(":")
        loop = asyncio.get_running_loop()
        _, client = await loop.create_connection(lambda: cls(target), host, int(port))
        return client

    async def call(self, path: str, request: bytes) -> Answer:
        """Make a call and give its whole answer; a request is far below 64 KiB.

        Raises:
            ConnectionError: the server broke off.
        """
        stream, self._next_id = self._next_id, self._next_id + 2
        ended: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._calls[stream] = ended
        self._arrivals[stream], self._partial[stream] = [], b""
        self._unsent.append((stream, path, struct.pack(">BI", 0, len(request)) + request))
        self._send_calls()
        return await ended

    def close(self) -> None:
        """Close the connection."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet, and grant the server all the window there is."""
        self._transport = cast("asyncio.Transport", transport)
        settings = struct.pack(">HIHIHI", 1, 0, 2, 0, 4, _LARGEST_WINDOW)
        grant = struct.pack(">I", _LARGEST_WINDOW - _DEFAULT_WINDOW)
        self._write(_PREFACE + _frame(_SETTINGS, 0, 0, settings))
        self._write(_frame(_WINDOW_UPDATE, 0, 0, grant))

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail what is open."""
        self._fail("the connection was lost")

    def data_received(self, data: bytes) -> None:
        """Take every whole frame."""
        data = self._unread + data
        at = 0
        while len(data) - at >= _FRAME_HEADER:
            end = at + _FRAME_HEADER + int.from_bytes(data[at : at + 3], "big")
            if len(data) < end:
                break
            stream = int.from_bytes(data[at + 5 : at + 9], "big") & _LARGEST_WINDOW
            self._take(data[at + 3], data[at + 4], stream, data[at + _FRAME_HEADER : end])
            at = end
        self._unread = data[at:]

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _DATA:
            body = payload[1 : len(payload) - payload[0]] if flags & _PADDED else payload
            self._deliver(stream, body, ended=bool(flags & _END_STREAM))
        elif kind == _HEADERS and flags & _END_STREAM:
            self._deliver(stream, b"", ended=True)
        elif kind == _SETTINGS and not flags & _ACK:
            self._write(_frame(_SETTINGS, _ACK, 0, b""))
        elif kind == _PING and not flags & _ACK:
            self._write(_frame(_PING, _ACK, 0, payload))
        elif kind == _WINDOW_UPDATE and stream == 0:
            self._window += int.from_bytes(payload, "big")
            self._send_calls()
        elif kind in (_RST_STREAM, _GOAWAY):
            self._fail(f"the server ended stream {stream}: {payload!r}")

    def _deliver(self, stream: int, body: bytes, *, ended: bool) -> None:
        if stream not in self._calls:
            return
        data = self._partial[stream] + body
        at = 0
        while len(data) - at >= _GRPC_HEADER:
            end = at + _GRPC_HEADER + int.from_bytes(data[at + 1 : at + _GRPC_HEADER], "big")
            if len(data) < end:
                break
            self._arrivals[stream].append((time.perf_counter(), data[at + _GRPC_HEADER : end]))
            at = end
        self._partial[stream] = data[at:]
        if ended:
            del self._partial[stream]
            self._calls.pop(stream).set_result((self._arrivals.pop(stream), time.perf_counter()))

    def _fail(self, why: str) -> None:
        calls, self._calls = self._calls, {}
        for ended in calls.values():
            ended.set_exception(ConnectionError(why))

    def _write(self, data: bytes) -> None:
        if self._transport is None:
            raise ConnectionError("there is no connection yet")
        self._transport.write(data)

    def _send_calls(self) -> None:
        """Send each call that the window takes in one write, as gRPC's own clients do."""
        while self._unsent and len(self._unsent[0][2]) <= self._window:
            stream, path, body = self._unsent.popleft()
            self._window -= len(body)
            data = _frame(_HEADERS, _END_HEADERS, stream, _headers(path, self._authority))
            # No frame is longer than what every server takes before its settings are known.
            for at in range(0, len(body), _MAX_FRAME):
                is_last = at + _MAX_FRAME >= len(body)
                part = body[at : at + _MAX_FRAME]
                data += _frame(_DATA, _END_STREAM if is_last else 0, stream, part)
            self._write(data)


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">BHBBI", *divmod(len(payload), 1 << 16), kind, flags, stream) + payload


def _headers(path: str, authority: str) -> bytes:
    """Every field as a literal that is not indexed (RFC 7541, 6.2.2): no state, no table."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": authority,
        "te": "trailers",
        "content-type": "application/grpc",
    }
    return b"".join(
        b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in fields.items()
    )
