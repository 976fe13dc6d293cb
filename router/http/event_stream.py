"""A generation as server-sent events.

The answer starts with the first event, so a failure before it still has its own HTTP status; after
it a failure is one `data: {"error": ...}` event and the stream ends without [DONE]. Every event is
sent on its own as soon as it exists; when the client reads slowly, `send` waits and the generation
makes fewer, larger pieces. When the client leaves, the generation is closed at once.
"""

from __future__ import annotations

import contextlib

from starlette.types import Receive, Scope, Send

from router.error_map import status_of
from router.http.answer_shapes import AnswerShape
from router.http.disconnect import while_connected
from router.http.errors import ClientGoneError, as_penstock_error, penstock_error_body
from router.http.json_text import json_bytes
from router.http.piece_source import PieceSource
from router.http.request_head import request_id_of

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class EventStream:
    """An ASGI answer that prints pieces as they come."""

    def __init__(self, source: PieceSource, shape: AnswerShape, first_event: bytes) -> None:
        self._source = source
        self._shape = shape
        self._first = first_event

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Print the stream; returns when it has ended and the generation is closed."""
        try:
            with contextlib.suppress(ClientGoneError):
                await while_connected(receive, self._print(scope, send))
        finally:
            await self._source.aclose()

    async def _print(self, scope: Scope, send: Send) -> None:
        tier = [(name.encode(), value.encode()) for name, value in self._source.tier.items()]
        await send({"type": "http.response.start", "status": 200, "headers": [*_HEADERS, *tier]})
        await _send_events(send, self._first)
        try:
            async for piece in self._source:
                event = self._shape.event(piece)
                if event:
                    await _send_events(send, event)
            last = self._shape.ending(self._source.usage)
        except Exception as error:  # the status is sent: it can only become an event
            last = _error_event(error, request_id_of(scope))
        await send({"type": "http.response.body", "body": last, "more_body": False})


async def open_event_stream(source: PieceSource, shape: AnswerShape) -> EventStream:
    """Wait for the first event, so that a failure before it is raised here.

    Raises:
        PenstockError: the generation failed before it showed anything.
    """
    first = b""
    try:
        while not first:
            piece = await anext(source, None)
            if piece is None:
                break
            first = shape.event(piece)
    except BaseException:
        await source.aclose()
        raise
    return EventStream(source, shape, first)


async def _send_events(send: Send, events: bytes) -> None:
    if events:
        await send({"type": "http.response.body", "body": events, "more_body": True})


def _error_event(error: Exception, request_id: str) -> bytes:
    known = as_penstock_error(error)
    body = penstock_error_body(known, request_id)
    body["error"]["status"] = status_of(known).http
    return b"data: " + json_bytes(body) + b"\n\n"
