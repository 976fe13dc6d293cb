"""One streamed completion over HTTP with as little of our own CPU as Python allows.

Counts tokens by the server's own usage record; the first token is there with the first event that
holds a choice, whether or not its text is complete yet.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httptools

_READ_BYTES = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What came back, by `time.perf_counter`."""

    num_tokens: int
    first_s: float
    ended_s: float


class _Events:
    """Server-sent events out of one HTTP response."""

    def __init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.done = False
        self.failure = ""
        self.first_s = 0.0
        self.num_tokens = 0
        self._rest = b""

    def on_body(self, body: bytes) -> None:
        """Called by the parser with what a chunk held."""
        if self.parser.get_status_code() != 200:
            self.failure += body.decode(errors="replace")
            return
        *lines, self._rest = (self._rest + body).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip())

    def on_message_complete(self) -> None:
        """Called by the parser at the end of the response."""
        self.done = True

    def _event(self, data: bytes) -> None:
        if data == b"[DONE]":
            return
        # Only the first and the last event are read: parsing each would cost more than the rest.
        if self.first_s and b'"completion_tokens"' not in data and b'"error"' not in data:
            return
        event = json.loads(data)
        if "error" in event:
            self.failure = str(event["error"])
        if event.get("choices") and not self.first_s:
            self.first_s = time.perf_counter()
        if usage := event.get("usage"):
            self.num_tokens = usage["completion_tokens"]


async def stream_completion(target: str, body: Mapping[str, Any]) -> Completion:
    """POST /v1/completions on a connection of its own and read the stream to its end.

    Raises:
        RuntimeError: the server refused the request or broke off.
    """
    host, _, port = target.rpartition(":")
    payload = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {target}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(head.encode() + payload)
        events = _Events()
        while not events.done:
            data = await reader.read(_READ_BYTES)
            if not data:
                raise RuntimeError("the server closed the connection in the middle of an answer")
            events.parser.feed_data(data)
        if events.failure:
            raise RuntimeError(events.failure[:300])
    finally:
        writer.close()
    return Completion(
        num_tokens=events.num_tokens, first_s=events.first_s, ended_s=time.perf_counter()
    )
