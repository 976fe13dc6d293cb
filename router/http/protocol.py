"""uvicorn's httptools protocol with the bounds it lacks.

Plain uvicorn buffers a header of any size, waits for ever for a slow one, takes any number of body
chunks and answers bad bytes in plain text. Here a head is bounded in bytes and time while it is
still arriving, chunks are counted, connections are capped, and every refusal is an OpenAI error
body. Checks of a complete head are in `request_head.py`.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from router.access.tls_listener import has_certificate
from router.http.errors import error_body
from router.http.json_text import json_bytes
from router.http.limits import HttpLimits
from router.http.request_head import CERTIFICATE_KEY

_MAX_IGNORED_BYTES = 64 * 1024 * 1024
"""Body bytes tolerated after the answer, before the connection is cut."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection; use `bounded_protocol` to fix its limits."""

    limits = HttpLimits()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._in_head = True
        self._num_chunks = 0
        self._ignored_bytes = 0
        self._has_certificate = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock for the first head."""
        super().connection_made(transport)
        self._has_certificate = has_certificate(transport)
        if len(self.connections) > self.limits.max_connections:
            self._refuse(503, "overloaded", "Too many connections.", "server_error")
            return
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._stop_head_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Feed the parser, unless the head grew too large."""
        if self.transport.is_closing() or self.parser is None:
            return
        if self._in_head and self._head_timer is None:
            self._start_head_timer()
        self._head_bytes += len(data)
        super().data_received(data)
        limit = self.limits.max_url_bytes + self.limits.max_header_bytes
        if self._in_head and self._head_bytes > limit and not self.transport.is_closing():
            self._refuse(431, "headers_too_large", "The request's head is too large.")

    def on_message_begin(self) -> None:
        """A new head begins."""
        super().on_message_begin()
        self.scope[CERTIFICATE_KEY] = self._has_certificate  # type: ignore[literal-required]
        self._num_chunks = 0
        self._in_head = True

    def on_url(self, url: bytes) -> None:
        """Refuse a URL that uvicorn could not even parse."""
        super().on_url(url)
        if len(self.url) > self.limits.max_url_bytes and not self.transport.is_closing():
            self._refuse(414, "url_too_long", "The URL is too long.")

    def on_headers_complete(self) -> None:
        """The head is complete: its other checks are the app's."""
        self._in_head = False
        self._stop_head_timer()
        if not self.transport.is_closing():
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The body is complete: what follows is another head."""
        self._in_head = True
        self._head_bytes = 0
        if not self.transport.is_closing():
            super().on_message_complete()

    def on_body(self, body: bytes) -> None:
        """Count the pieces of a body, and the bytes nobody reads any more."""
        if self.transport.is_closing():
            return
        self._num_chunks += 1
        if self._num_chunks > self.limits.max_body_chunks:
            self._refuse(400, "invalid_request", "The body has too many chunks.")
        if self.cycle.response_complete:
            self._ignored_bytes += len(body)
            if self._ignored_bytes > _MAX_IGNORED_BYTES:
                self.transport.abort()
        if not self.transport.is_closing():
            super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are not HTTP."""
        if not self.transport.is_closing():
            self._refuse(400, "invalid_request", msg)

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(self.limits.head_timeout_s, self._head_too_slow)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_too_slow(self) -> None:
        self._head_timer = None
        if self.cycle is not None and not self.cycle.response_complete:
            # Part of a pipelined head; reading may be paused until the running answer ends.
            self._start_head_timer()
        elif not self.transport.is_closing():
            self._refuse(408, "request_timeout", "The request's head came too slowly.")

    def _refuse(
        self, status: int, code: str, message: str, kind: str = "invalid_request_error"
    ) -> None:
        self._stop_head_timer()
        # A streamed answer may be on its way on this connection: nothing can be put into it.
        if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
            body = json_bytes(error_body(message, kind, None, code))
            head = (
                STATUS_LINE[status],
                b"content-type: application/json\r\nconnection: close\r\n",
                b"retry-after: 1\r\n" if status == 503 else b"",
                b"content-length: %d\r\n\r\n" % len(body),
            )
            self.transport.write(b"".join(head) + body)
        self.transport.close()


def bounded_protocol(limits: HttpLimits) -> type[asyncio.Protocol]:
    """The protocol class with these limits; uvicorn makes the instances."""
    return type("BoundedProtocol", (BoundedProtocol,), {"limits": limits})
