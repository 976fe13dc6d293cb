"""One client's HTTP/2 connection: the h2 library's state machine between a socket and calls.

What is sent during one turn of the loop leaves in one piece: the tokens of a step for all of a
client's calls cost one system call. Only the first message of a stream does not wait for the
others' (`send_now`). A peer gets no more than it was promised: streams, header
sizes, message sizes, pings, resets and idle frames are bounded.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Protocol, cast

import h2.events
from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError
from hyperframe.frame import GoAwayFrame

from router.access.tls_listener import has_certificate
from router.grpc.call import ServerCall
from router.grpc.call_framing import Header
from router.grpc.call_gate import CallGate, Refusal
from router.grpc.client_watch import ClientWatch
from router.grpc.data_frames import DataFrames
from router.grpc.h2_state import bound_headers, greet, new_h2
from router.grpc.peer_conduct import ConnectionLimits, PeerConduct

log = logging.getLogger(__name__)

_SLICE = 16 * 1024
"""What h2 is given at once: what it makes of small frames is judged before it gets more."""


class Front(Protocol):
    """Who counts connections."""

    def enter(self, connection: GrpcConnection) -> bool:
        """One is made; where it may not stay, its client is told to go."""

    def leave(self, connection: GrpcConnection) -> None:
        """One is lost."""


class GrpcConnection(asyncio.Protocol):
    """A server's end."""

    def __init__(
        self,
        gate: CallGate,
        limits: ConnectionLimits,
        front: Front,
    ) -> None:
        self.peer = ""
        self._gate = gate
        self._limits = limits
        self._front = front
        self._loop = asyncio.get_running_loop()
        self._h2 = new_h2(limits)
        self._unsent = DataFrames(self._h2)
        self._transport: asyncio.Transport | None = None
        self._calls: dict[int, ServerCall] = {}
        self._last_stream_id = 0
        self._has_certificate = False
        self._is_leaving = False
        self._flush_due = False
        self._is_paused = False
        self._writable: asyncio.Future[None] | None = None
        self._watch = ClientWatch(limits, self._ping, self._give_up)
        self._conduct = PeerConduct(limits, self._watch.heard_s)

    @property
    def num_calls(self) -> int:
        """Calls that have not ended."""
        return len(self._calls)

    # What the server does with it.

    def leave(self) -> None:
        """Take no new calls, and say so."""
        if not self._is_leaving and (transport := self._open_transport()):
            self._is_leaving = True
            self._flush()
            # h2's own close_connection would end the calls that run.
            farewell = GoAwayFrame(last_stream_id=self._last_stream_id)
            transport.write(farewell.serialize())
            self._close_if_done()

    def abort(self) -> None:
        """End every call and the connection now."""
        if self._transport is not None:
            self._transport.abort()

    # What calls do with it; each takes effect with the next flush.

    def send_headers(self, stream_id: int, headers: Sequence[Header]) -> None:
        """Begin an answer."""
        self._h2.send_headers(stream_id, headers)
        self._flush_soon()

    def send_data(self, stream_id: int, data: bytes) -> bytes:
        """Send as much as the client's windows take; the rest."""
        if self._is_paused:
            return data
        rest = self._unsent.add(stream_id, data)
        self._conduct.note_answer()
        self._flush_soon()
        return rest

    def send_now(self) -> None:
        """Do not wait for the end of this turn of the loop."""
        self._flush()

    async def wait_writable(self) -> None:
        """Wait until it is worth trying `send_data` again."""
        if self._writable is None:
            self._writable = self._loop.create_future()
        await asyncio.shield(self._writable)

    def end_stream(self, stream_id: int, headers: Sequence[Header], *, is_read: bool) -> None:
        """End an answer; where the request is not all there, the client need not send the rest."""
        self._calls.pop(stream_id, None)
        try:
            self._h2.send_headers(stream_id, headers, end_stream=True)
            if not is_read:
                self._h2.reset_stream(stream_id, ErrorCodes.NO_ERROR)
        except ProtocolError as error:
            log.debug("call %d of %s was over already: %s", stream_id, self.peer, error)
        self._conduct.note_answer()
        self._flush_soon()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet."""
        self._transport = cast("asyncio.Transport", transport)
        self.peer = _peer_name(transport.get_extra_info("peername"))
        self._has_certificate = has_certificate(transport)
        greet(self._h2, self._limits)
        self._flush()
        self._watch.start()
        if not self._front.enter(self):
            self._turn_out("too many connections")

    def connection_lost(self, exc: Exception | None) -> None:
        """Everything on it ends."""
        self._transport = None
        self._watch.stop()
        self._drop_calls()
        self._front.leave(self)

    def pause_writing(self) -> None:
        """See `asyncio.BaseProtocol`."""
        self._is_paused = True

    def resume_writing(self) -> None:
        """See `asyncio.BaseProtocol`."""
        self._is_paused = False
        self._wake_writers()

    def data_received(self, data: bytes) -> None:
        """Take what arrived; bytes that break HTTP/2 end the connection, as it prescribes."""
        self._watch.note_heard()
        transport = self._transport
        try:
            for start in range(0, len(data), _SLICE):
                for event in self._h2.receive_data(data[start : start + _SLICE]):
                    self._take(event)
                if transport is None or transport.is_closing():
                    return
        except ProtocolError as error:
            log.info("client %s breaks HTTP/2: %s", self.peer, error)
            self._part()
            return
        self._flush_soon()
        if (
            transport is not None
            and self._is_paused
            and transport.get_write_buffer_size() > self._limits.max_unsent_bytes
        ):
            transport.abort()

    def _take(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RequestReceived):
            self._begin(event.stream_id, event.headers)
        elif isinstance(event, h2.events.DataReceived):
            self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            if call := self._calls.get(event.stream_id):
                call.take_data(event.data)
        elif isinstance(event, h2.events.StreamEnded):
            if call := self._calls.get(event.stream_id):
                call.take_end()
        elif isinstance(event, h2.events.StreamReset):
            if call := self._calls.pop(event.stream_id, None):
                call.vanish()
                self._close_if_done()
        elif isinstance(event, h2.events.WindowUpdated):
            self._wake_writers()
        elif isinstance(event, h2.events.RemoteSettingsChanged):
            self._watch.note_greeting()
            self._wake_writers()
        elif isinstance(event, h2.events.SettingsAcknowledged):
            bound_headers(self._h2, self._limits)
        if why := self._conduct.offence(event, self._watch.heard_s):
            self._turn_out(why)

    def _begin(self, stream_id: int, fields: Sequence[Header]) -> None:
        self._last_stream_id = max(self._last_stream_id, stream_id)
        if self._is_leaving:
            self._h2.reset_stream(stream_id, ErrorCodes.REFUSED_STREAM)
            return
        head = self._gate.admit(fields, has_certificate=self._has_certificate)
        if isinstance(head, Refusal):
            self.end_stream(stream_id, head.headers, is_read=False)
            return
        call = ServerCall(self, stream_id, head.method, head.reader)
        self._calls[stream_id] = call
        call.expect_request(self._limits.request_timeout_s)
        if head.timeout_s is not None:
            call.expire_after(head.timeout_s)

    def _turn_out(self, why: str) -> None:
        """End the connection of a client that misbehaves."""
        log.warning("client %s is turned out: %s", self.peer, why)
        self._h2.close_connection(ErrorCodes.ENHANCE_YOUR_CALM, why.encode())
        self._part()

    def _part(self) -> None:
        """Say what h2 has to say at the end, and close."""
        self._drop_calls()
        self._flush()
        if transport := self._open_transport():
            transport.close()

    def _drop_calls(self) -> None:
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.vanish()

    def _ping(self) -> None:
        self._h2.ping(b"penstock")
        self._flush()

    def _give_up(self, why: str) -> None:
        log.info("client %s is given up: %s", self.peer, why)
        self.abort()

    def _wake_writers(self) -> None:
        if self._writable is not None:
            self._writable.set_result(None)
            self._writable = None

    def _flush_soon(self) -> None:
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        data = self._unsent.take()
        if transport := self._open_transport():
            if data:
                transport.write(data)
            self._close_if_done()

    def _close_if_done(self) -> None:
        if self._is_leaving and not self._calls and (transport := self._open_transport()):
            transport.close()

    def _open_transport(self) -> asyncio.Transport | None:
        """The transport unless it is closing: asyncio's one of TLS breaks when closed twice."""
        transport = self._transport
        return None if transport is None or transport.is_closing() else transport


def _peer_name(address: tuple[str, int] | None) -> str:
    """`ipv4:1.2.3.4:5` or `ipv6:[::1]:5`."""
    if not address:
        return "unknown"
    host, port = address[:2]
    return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"
