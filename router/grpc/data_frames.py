"""DATA frames of answers, written past h2's state machine: the hot path of every streamed token.

h2 walks two state machines and builds a frame object for each message, 40 % of what a gateway did
for a stream. To send DATA on an answer that has begun and not ended changes no state, so all that
is needed of h2 are its windows, which stay its own: what is sent here is taken off them.
Flow control as in RFC 9113, 5.2 and 6.9.
"""

from __future__ import annotations

import struct

from h2.connection import H2Connection

_HEADER = struct.Struct(">HBBBI")
"""Length (its upper 16 of 24 bits, then the lower 8), type, flags, stream."""

_DATA = 0
_NO_FLAGS = 0


class DataFrames:
    """What waits to be written on one connection, in order: h2's own frames and DATA."""

    def __init__(self, h2: H2Connection) -> None:
        self._h2 = h2
        self._parts: list[bytes] = []

    def add(self, stream_id: int, data: bytes) -> bytes:
        """Add as much as the client's windows take, to an open answer; returns the rest."""
        h2 = self._h2
        stream = h2.streams[stream_id]
        room = min(h2.outbound_flow_control_window, stream.outbound_flow_control_window, len(data))
        if room <= 0:
            return data
        if other := h2.data_to_send():  # the answer's headers, before its DATA
            self._parts.append(other)
        for at in range(0, room, h2.max_outbound_frame_size):
            part = data[at : min(at + h2.max_outbound_frame_size, room)]
            size = len(part)
            self._parts += (_HEADER.pack(size >> 8, size & 0xFF, _DATA, _NO_FLAGS, stream_id), part)
        h2.outbound_flow_control_window -= room
        stream.outbound_flow_control_window -= room
        return data[room:]

    def take(self) -> bytes:
        """Everything that waits, which waits no more."""
        other = self._h2.data_to_send()
        if not self._parts:
            return other
        parts, self._parts = self._parts, []
        parts.append(other)
        return b"".join(parts)
