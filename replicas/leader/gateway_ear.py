"""The leader's ear to one gateway: whole messages, handed on as they come, until the gateway goes.

It is a callback of the loop and no task: a request that arrives wakes the loop and nothing else.
Knows frames and silence, not requests.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

from cluster.base.errors import InternalError, PenstockError
from replicas.leader.stream_codec import FrameReader, ToReplica, decode_to_replica

log = logging.getLogger(__name__)

_READ_BYTES = 1 << 16


class GatewayEar:
    """Listens as soon as it is made, on the loop's thread."""

    def __init__(self, sock: socket.socket, obey: Callable[[ToReplica], None]) -> None:
        """`sock` is connected and does not block; `obey` may raise what ends the stream."""
        self._sock = sock
        self._obey = obey
        self._frames = FrameReader()
        self._loop = asyncio.get_running_loop()
        self._heard_s = self._loop.time()
        self._ended: asyncio.Future[OSError | PenstockError | None] = self._loop.create_future()
        self._loop.add_reader(sock, self._read)

    async def wait_end(self, patience_s: Callable[[], float]) -> None:
        """Listen until the gateway goes.

        Args:
            patience_s: seconds of silence after which it counts as gone, asked for anew each time.

        Raises:
            TimeoutError: it was silent for too long.
            OSError: the connection broke.
            PenstockError: it said what nobody should.
        """
        while not self._ended.done():
            left_s = self._heard_s + patience_s() - self._loop.time()
            if left_s <= 0.0:
                raise TimeoutError
            await asyncio.wait((self._ended,), timeout=left_s)
        if error := self._ended.result():
            raise error

    def close(self) -> None:
        """Get off the socket, before it is closed; safe to call twice."""
        self._loop.remove_reader(self._sock)

    def _read(self) -> None:
        try:
            data = self._sock.recv(_READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._end(error)
            return
        if not data:
            self._end(None)
            return
        self._heard_s = self._loop.time()
        try:
            for payload in self._frames.feed(data):
                self._obey(decode_to_replica(payload))
        except PenstockError as error:
            self._end(error)
        except Exception:
            log.exception("a message of a gateway could not be handled")
            self._end(InternalError("The gateway's stream could not be read."))

    def _end(self, error: OSError | PenstockError | None) -> None:
        self.close()
        self._ended.set_result(error)
