"""Accepts connections of a listening socket and takes them through their TLS handshake.

asyncio's own server makes the protocol of a connection first and does not say when the handshake
fails, so that nobody could count connections, and any number of them may hang in theirs. Here
handshakes are bounded in number and time, and a protocol only meets clients that speak TLS.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import Callable

log = logging.getLogger(__name__)

HANDSHAKE_S = 10.0
_SHUTDOWN_S = 5.0
"""How long a client may take to say goodbye."""
MAX_HANDSHAKES = 1024
"""Handshakes at once; over it a new connection is closed."""
_REST_S = 1.0
"""... after there was no room for another connection: too many files, say."""


class TlsListener:
    """Serves one socket until it is closed.

    Args:
        sock: listens already, and belongs to this object.
        make_protocol: of a connection; called before the handshake, so it must count nothing.
        context: the server's side of TLS, asked for at each connection.
        handshake_s: seconds that a client has for it.
    """

    def __init__(
        self,
        sock: socket.socket,
        make_protocol: Callable[[], asyncio.Protocol],
        context: Callable[[], ssl.SSLContext],
        *,
        handshake_s: float = HANDSHAKE_S,
        max_handshakes: int = MAX_HANDSHAKES,
    ) -> None:
        self._socket = sock
        self._make_protocol = make_protocol
        self._context = context
        self._handshake_s = handshake_s
        self._max_handshakes = max_handshakes
        self._handshakes: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._accept())

    @property
    def num_handshakes(self) -> int:
        """Those that are not over."""
        return len(self._handshakes)

    def close(self) -> None:
        """Accept nothing more; connections that are made go on."""
        # Closed when nobody waits for it: the loop knows it by its number.
        self._task.add_done_callback(lambda _: self._socket.close())
        for task in (self._task, *self._handshakes):
            task.cancel()

    async def _accept(self) -> None:
        while True:
            try:
                connection, peer = await self._loop.sock_accept(self._socket)
            except OSError as error:
                if error.errno != errno.ECONNABORTED:
                    log.error("no new connection can be accepted: %s", error)
                    await asyncio.sleep(_REST_S)
                continue
            if len(self._handshakes) >= self._max_handshakes:
                connection.close()
                continue
            task = self._loop.create_task(self._greet(connection, peer))
            self._handshakes.add(task)
            task.add_done_callback(self._handshakes.discard)

    async def _greet(self, connection: socket.socket, peer: object) -> None:
        try:
            await self._loop.connect_accepted_socket(
                self._make_protocol,
                connection,
                ssl=self._context(),
                ssl_handshake_timeout=self._handshake_s,
                ssl_shutdown_timeout=_SHUTDOWN_S,
            )
        except OSError as error:  # ssl.SSLError and a timeout are such
            log.info("client %s did not finish its TLS handshake: %s", peer, error)


def has_certificate(transport: asyncio.BaseTransport) -> bool:
    """Whether the client has shown a certificate; TLS has checked it."""
    return bool(transport.get_extra_info("peercert"))
