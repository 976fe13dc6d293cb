"""The leader's end of one gateway's connection: what waits to be sent to it.

Any thread may send: the engine's thread writes a step's tokens to the socket itself, without waking
another thread for it. The socket never blocks. When it takes no more, what follows gathers here and
the loop sends it, in fewer, larger messages, as the gateway reads. What can gather is bounded by
the tokens that the gateway's own running requests may still produce.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections import deque
from collections.abc import Iterable

from cluster.base.errors import InternalError, PenstockError
from replicas.api import ReplicaStats
from replicas.leader.stream_codec import Cancelled, Delta, Goodbye, Step, frame

log = logging.getLogger(__name__)

MAX_MESSAGE_WEIGHT = 1 << 20
"""Rough bytes in one Step message; well under the hop's message cap."""

_LOGPROB_WEIGHT = 330
"""Bytes of one token's logprob with 20 alternatives."""


class GatewayLink:
    """Pending messages of one connected gateway; made on the loop's thread."""

    def __init__(self, sock: socket.socket, serial: int) -> None:
        """`sock` is connected and does not block; the link never closes it."""
        self.gateway_id = ""
        self.serial = serial
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._pending: deque[Delta] = deque()
        self._answers: deque[Cancelled] = deque()
        self._load = ReplicaStats()
        self._draining = False
        self._has_news = False
        self._goodbye: PenstockError | None = None
        self._has_said_goodbye = False
        self._unsent = memoryview(b"")
        self._is_full = False
        self._is_over = False
        self._over = self._loop.create_future()

    def engine_id(self, stream_key: int, request_id: str) -> str:
        """An id no other request of this leader has, whatever ids clients choose."""
        return f"{self.serial}-{stream_key}-{request_id}"

    def send(self, deltas: Iterable[Delta], load: ReplicaStats, *, draining: bool) -> None:
        """Send deltas and the newest load; from any thread, never waits."""
        with self._lock:
            self._pending.extend(deltas)
            self._load, self._draining, self._has_news = load, draining, True
            self._flush()

    def answer(self, message: Cancelled) -> None:
        """Send an answer ahead of what is queued; from any thread, never waits."""
        with self._lock:
            self._answers.append(message)
            self._flush()

    def say_goodbye(self, error: PenstockError) -> None:
        """End the stream after what is queued, giving the gateway the reason; from any thread."""
        with self._lock:
            if self._goodbye is None:
                self._goodbye = error
                self._flush()

    def end(self) -> None:
        """Send no more; on the loop's thread, before the socket is closed."""
        with self._lock:
            self._is_over = True
            self._pending.clear()
            self._answers.clear()
        self._loop.remove_writer(self._sock)
        self._tell_over()

    async def wait_over(self) -> None:
        """Wait until the goodbye has left, or the gateway takes nothing any more."""
        await asyncio.shield(self._over)

    def _flush(self) -> None:
        """Send what the socket takes; the caller holds the lock."""
        while not self._is_full and not self._is_over:
            if not self._unsent:
                self._unsent = memoryview(self._next_frame())
                if not self._unsent:
                    return
            try:
                self._unsent = self._unsent[self._sock.send(self._unsent) :]
            except BlockingIOError:
                pass
            except OSError as error:
                log.warning("the stream of gateway %s broke: %s", self.gateway_id, error)
                self._finish()
                return
            if self._unsent:
                self._is_full = True
                self._loop.call_soon_threadsafe(self._wait_writable)

    def _next_frame(self) -> bytes:
        """The next message of what waits; empty when nothing does."""
        if self._answers:
            return frame(self._answers.popleft())
        if not self._pending and not self._has_news:
            if self._goodbye is None:
                return b""
            if self._has_said_goodbye:
                self._finish()
                return b""
            self._has_said_goodbye = True
            return frame(Goodbye(self._goodbye.to_dict()))
        deltas: list[Delta] = []
        weight = 0
        while self._pending and weight < MAX_MESSAGE_WEIGHT:
            delta = self._pending.popleft()
            deltas.append(delta)
            weight += _weight(delta)
        self._has_news = False
        try:
            return frame(Step(deltas, self._load, self._draining))
        except InternalError as error:
            # Nothing can be left out of a stream: its gateway begins anew.
            log.exception("the stream of gateway %s ends", self.gateway_id)
            self._pending.clear()
            self._goodbye, self._has_said_goodbye = error, True
            return frame(Goodbye(error.to_dict()))

    def _finish(self) -> None:
        self._is_over = True
        self._loop.call_soon_threadsafe(self._tell_over)

    def _tell_over(self) -> None:
        if not self._over.done():
            self._over.set_result(None)

    def _wait_writable(self) -> None:
        if not self._is_over:
            self._loop.add_writer(self._sock, self._on_writable)

    def _on_writable(self) -> None:
        self._loop.remove_writer(self._sock)
        with self._lock:
            self._is_full = False
            self._flush()


def _weight(delta: Delta) -> int:
    if delta.whole is None:
        return 16 + 4 * len(delta.token_ids)
    whole = delta.whole
    scored = len(whole.logprobs) + len(whole.prompt_logprobs)
    return 64 + 9 * (len(whole.token_ids) + len(whole.embedding)) + _LOGPROB_WEIGHT * scored
