"""One call: its messages in, its handler's task, its answer out.

It is what servicers get as their context, in the terms of `grpc.aio.ServicerContext`. A write goes
to the connection at once when HTTP/2's windows allow, and waits where they do not: a client that
does not read makes its own handler wait. Whatever ends a call (the handler, its deadline, the
client, the connection) ends its task.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, NoReturn

import grpc

from router.grpc import call_framing as framing
from router.grpc.call_framing import CallError, Header, MessageReader
from router.grpc.method_table import Method
from router.grpc.request_inbox import RequestInbox

if TYPE_CHECKING:
    from router.grpc.connection import GrpcConnection

log = logging.getLogger(__name__)

Metadata = tuple[tuple[str, str | bytes], ...]

_FIRST_HEADERS: tuple[Header, ...] = (
    (b":status", b"200"),
    (b"content-type", b"application/grpc"),
    (b"grpc-accept-encoding", framing.ACCEPTED_ENCODINGS),
)


class AbortedError(Exception):
    """Leaves a handler that called `abort`."""


class ServerCall:
    """A call of one client to one method."""

    def __init__(
        self,
        connection: GrpcConnection,
        stream_id: int,
        method: Method,
        reader: MessageReader,
    ) -> None:
        self._connection = connection
        self._stream_id = stream_id
        self._method = method
        self._inbox = RequestInbox(method, reader)
        self._has_headers = False
        self._has_written = False
        self._trailing: Metadata = ()
        self._ending: tuple[grpc.StatusCode, str] | None = None
        self._is_over = False
        self._deadline: asyncio.TimerHandle | None = None
        self._arrival: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        if method.request_streaming:
            self._start()

    # What servicers use.

    def peer(self) -> str:
        """The client's address, as gRPC writes it."""
        return self._connection.peer

    def set_trailing_metadata(self, metadata: Metadata) -> None:
        """Metadata that goes out with the status."""
        self._trailing = metadata

    async def send_initial_metadata(self, metadata: Metadata) -> None:
        """Answer the call's headers; they leave with what is written next in this turn."""
        self._check_open()
        if not self._has_headers:
            self._has_headers = True
            headers = [*_FIRST_HEADERS, *framing.metadata_headers(metadata)]
            self._connection.send_headers(self._stream_id, headers)

    async def write(self, message: Any) -> None:
        """Send a message of the answer; waits while the client does not read.

        The first one of a stream leaves at once: many other streams may have something to say in
        this turn of the loop, and their clients are not waiting for a first word.
        """
        self._check_open()
        if not self._has_headers:
            await self.send_initial_metadata(())
        data = framing.prefixed(self._method.response_serializer(message))
        rest = self._connection.send_data(self._stream_id, data)
        if not self._has_written:
            self._has_written = True
            if self._method.response_streaming:
                self._connection.send_now()
        while rest:
            await self._connection.wait_writable()
            rest = self._connection.send_data(self._stream_id, rest)

    async def write_last(self, message: Any) -> None:
        """Send the last message of the answer and, in one piece with it, that all is well.

        They leave before this returns: for what its handler has left to do, to count the call or
        to give its place back, no client waits. Nothing is read from any client meanwhile.
        """
        await self.write(message)
        self._ending = grpc.StatusCode.OK, ""
        self._finish()
        await asyncio.sleep(0)  # the connection sends at the end of this turn, before the next

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()
    ) -> NoReturn:
        """End the call with a status; does not return."""
        self._ending = code, details
        self._trailing = trailing_metadata or self._trailing
        raise AbortedError

    # What the connection tells.

    def expire_after(self, seconds: float) -> None:
        """Start the client's deadline."""
        self._deadline = asyncio.get_running_loop().call_later(
            seconds, self.stop, grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"
        )

    def expect_request(self, within_s: float) -> None:
        """End the call when its message is not all there by then; streams of them may take long."""
        if not self._method.request_streaming:
            text = f"The request did not arrive within {within_s:.0f} s."
            self._arrival = asyncio.get_running_loop().call_later(
                within_s, self.stop, grpc.StatusCode.DEADLINE_EXCEEDED, text
            )

    def take_data(self, data: bytes) -> None:
        """Add DATA of the client; what it does wrong ends the call."""
        try:
            self._inbox.take_data(data)
        except CallError as error:
            self.stop(error.code, error.text)

    def take_end(self) -> None:
        """The client has said all it has to say."""
        if self._arrival is not None:
            self._arrival.cancel()
        try:
            self._inbox.take_end()
        except CallError as error:
            self.stop(error.code, error.text)
            return
        if self._task is None:
            self._start()

    def stop(self, code: grpc.StatusCode, text: str) -> None:
        """End the call from outside its handler."""
        if self._is_over:
            return
        self._ending = code, text
        if self._task is not None:
            self._task.cancel()
        else:
            self._finish()

    def vanish(self) -> None:
        """The client has gone or reset the call: nothing can be sent any more."""
        self._is_over = True
        self._stop_clocks()
        if self._task is not None:
            self._task.cancel()

    # The handler.

    def _start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())
        # A task that is cancelled before its first step runs no handler and no cleaning up.
        self._task.add_done_callback(lambda _: self._finish())

    def _check_open(self) -> None:
        if self._is_over:
            raise AbortedError

    async def _run(self) -> None:
        try:
            await self._handle()
            ending = self._ending or (grpc.StatusCode.OK, "")
        except AbortedError:
            ending = self._ending or (grpc.StatusCode.UNKNOWN, "")
        except asyncio.CancelledError:
            ending = self._ending or (grpc.StatusCode.CANCELLED, "The server stops.")
        except Exception:
            log.exception("a gRPC method failed")
            ending = grpc.StatusCode.UNKNOWN, "The server failed; its log has the details."
        self._ending = ending
        self._finish()

    async def _handle(self) -> None:
        method = self._method
        request = self._inbox.request()
        if method.response_streaming:
            handler = method.stream_stream if method.request_streaming else method.unary_stream
            answer = handler(request, self)
            if hasattr(answer, "__aiter__"):
                async for message in answer:
                    await self.write(message)
            else:
                await answer  # it writes by itself
            return
        handler = method.stream_unary if method.request_streaming else method.unary_unary
        await self.write(await handler(request, self))

    def _stop_clocks(self) -> None:
        for clock in (self._deadline, self._arrival):
            if clock is not None:
                clock.cancel()

    def _finish(self) -> None:
        """Send the status, unless there is nobody to hear it."""
        self._stop_clocks()
        if self._is_over:
            return
        self._is_over = True
        first = [] if self._has_headers else list(_FIRST_HEADERS)
        status = framing.status_headers(*(self._ending or (grpc.StatusCode.CANCELLED, "")))
        headers = [*first, *status, *framing.metadata_headers(self._trailing)]
        self._connection.end_stream(self._stream_id, headers, is_read=self._inbox.is_over)
