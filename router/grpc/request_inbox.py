"""What a client has said in one call: whole messages that its handler has not taken yet."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import grpc

from router.grpc.call_framing import CallError, MessageReader
from router.grpc.method_table import Method


class RequestInbox:
    """The request side of a call; belongs to the connection's loop."""

    def __init__(self, method: Method, reader: MessageReader) -> None:
        self._method = method
        self._reader = reader
        self._unread: deque[bytes] = deque()
        self._wake: asyncio.Future[None] | None = None
        self.is_over = False
        """Whether the client has said all it has to say."""

    def take_data(self, data: bytes) -> None:
        """Add DATA of the client.

        Raises:
            CallError: it sends what the call does not take, or more than is served.
        """
        for message in self._reader.feed(data):
            self._unread.append(message)
        if sum(map(len, self._unread)) > self._reader.limit:
            text = "The client sends faster than its call is served."
            raise CallError(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        if len(self._unread) > 1 and not self._method.request_streaming:
            raise CallError(grpc.StatusCode.INTERNAL, "The call takes one message.")
        self._wake_reader()

    def take_end(self) -> None:
        """The client has said all it has to say.

        Raises:
            CallError: a message, or the one that the call takes, is not all there.
        """
        self.is_over = True
        self._wake_reader()
        if self._reader.is_within_message or not (self._unread or self._method.request_streaming):
            raise CallError(grpc.StatusCode.INTERNAL, "The request ends before its message does.")

    def request(self) -> Any:
        """What the handler is called with: the one message, or an iterator of them."""
        return self._messages() if self._method.request_streaming else self._next()

    def _next(self) -> Any:
        return self._method.request_deserializer(self._unread.popleft())

    async def _messages(self) -> AsyncIterator[Any]:
        while True:
            while not self._unread:
                if self.is_over:
                    return
                self._wake = asyncio.get_running_loop().create_future()
                await self._wake
            yield self._next()

    def _wake_reader(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)
