"""A gateway's connection to a leader: bytes in, messages out, and the reason of its end.

Knows frames, not requests. Whatever the other end sends, `data_received` does not raise: bytes that
are no message end the connection with a coded error.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import cast

from cluster.base.errors import InternalError, PenstockError, UnavailableError
from replicas.leader.stream_codec import (
    FrameReader,
    FromReplica,
    ToReplica,
    decode_from_replica,
    frame,
)

log = logging.getLogger(__name__)


class HopConnection(asyncio.Protocol):
    """One connection; made by the loop's `create_connection`."""

    def __init__(self, on_message: Callable[[FromReplica], None]) -> None:
        self._on_message = on_message
        self._frames = FrameReader()
        self._transport: asyncio.Transport | None = None
        self.ended: asyncio.Future[PenstockError] = asyncio.get_running_loop().create_future()
        """Why the connection is of no use any more, once it is not."""

    def send(self, message: ToReplica) -> None:
        """Queue a message; after the end it goes nowhere.

        Raises:
            InternalError: it is too long.
        """
        data = frame(message)
        if self._transport is not None and not self.ended.done():
            self._transport.write(data)

    def end(self, error: PenstockError) -> None:
        """Give the connection up; the first reason counts."""
        if not self.ended.done():
            self.ended.set_result(error)
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        try:
            for payload in self._frames.feed(data):
                self._on_message(decode_from_replica(payload))
                if self.ended.done():
                    return
        except PenstockError as error:
            self.end(error)
        except Exception:
            log.exception("a message of the replica could not be handled")
            self.end(InternalError("The replica's stream could not be read."))

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        detail = f" ({exc})" if exc is not None else ""
        self.end(UnavailableError(f"The replica's stream was lost{detail}."))
