"""Runs the HTTP app on an open socket inside the gateway's event loop.

uvicorn does the HTTP; this file owns the socket (SO_REUSEPORT, so that several gateways share a
port and one may die), start, and a stop that lets running answers finish. Signals are left to the
process that owns the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Iterator
from typing import cast

import uvicorn
from starlette.types import ASGIApp

from router.access.tls_listener import TlsListener
from router.http.limits import HttpLimits
from router.http.protocol import bounded_protocol
from router.listen import BACKLOG


class HttpServer:
    """A running front; make it with `serve_http`."""

    def __init__(
        self,
        app: ASGIApp,
        sock: socket.socket,
        limits: HttpLimits,
        drain_s: float,
        tls: Callable[[], ssl.SSLContext] | None,
    ) -> None:
        config = uvicorn.Config(
            app,
            http=bounded_protocol(limits),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=limits.keep_alive_s,
            timeout_graceful_shutdown=max(1, round(drain_s)),
            backlog=BACKLOG,
        )
        self._socket = sock
        self._server = _QuietServer(config, tls, handshake_s=limits.head_timeout_s)
        self._task: asyncio.Task[None] | None = None
        self.port: int = sock.getsockname()[1]

    async def start(self) -> None:
        """Return once connections are accepted."""
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        listening = asyncio.ensure_future(self._server.listening.wait())
        await asyncio.wait((self._task, listening), return_when=asyncio.FIRST_COMPLETED)
        listening.cancel()
        if self._task.done():
            self._task.result()

    async def stop(self, drain_s: float | None = None) -> None:
        """Accept nothing more, let running answers finish for `drain_s`, then end them.

        Args:
            drain_s: seconds; None: those it was made with.
        """
        if drain_s is not None:
            self._server.config.timeout_graceful_shutdown = max(1, round(drain_s))
        self._server.should_exit = True
        if self._task is not None:
            await self._task


async def serve_http(
    app: ASGIApp,
    sock: socket.socket,
    *,
    limits: HttpLimits | None = None,
    drain_s: float = 20.0,
    tls: Callable[[], ssl.SSLContext] | None = None,
) -> HttpServer:
    """Start serving `app` on a listening socket, which is the server's to close.

    `tls` switches TLS on: the context for the next connection.
    """
    server = HttpServer(app, sock, limits or HttpLimits(), drain_s, tls)
    await server.start()
    return server


class _QuietServer(uvicorn.Server):
    def __init__(
        self,
        config: uvicorn.Config,
        tls: Callable[[], ssl.SSLContext] | None,
        *,
        handshake_s: float,
    ) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()
        self._tls = tls
        self._handshake_s = handshake_s
        self._listeners: list[TlsListener] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen; with TLS uvicorn gets no sockets but connections after their handshake."""
        tls = self._tls
        await super().startup(sockets if tls is None else [])
        if tls is not None:
            self._listeners = [
                TlsListener(sock, self._protocol, tls, handshake_s=self._handshake_s)
                for sock in sockets or ()
            ]
        self.listening.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept nothing more, then as uvicorn does."""
        for listener in self._listeners:
            listener.close()
        await super().shutdown(sockets if self._tls is None else None)

    def _protocol(self) -> asyncio.Protocol:
        """As uvicorn makes them."""
        make = cast("Callable[..., asyncio.Protocol]", self.config.http_protocol_class)
        return make(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the process."""
        yield
