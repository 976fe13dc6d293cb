"""Runs the HTTP app on an open socket inside the gateway's event loop.

uvicorn does the HTTP; this file owns the socket (SO_REUSEPORT, so that several gateways share a
port and one may die), start, and a stop that lets running answers finish. Signals are left to the
process that owns the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from cluster.base.errors import ConfigError
from router.http.limits import HttpLimits
from router.http.protocol import bounded_protocol

_BACKLOG = 1024


def bind_http(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 picks a free one.

    Raises:
        ConfigError: the address cannot be bound.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, proto)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(address)
            sock.listen(_BACKLOG)
            sock.setblocking(False)
        except OSError:
            sock.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"The HTTP front cannot listen on {host}:{port}: {error.strerror or error}.",
            "Choose another address or end what uses it.",
            param="gateway.http_port",
        ) from error
    return sock


class HttpServer:
    """A running front; make it with `serve_http`."""

    def __init__(
        self, app: ASGIApp, sock: socket.socket, limits: HttpLimits, drain_s: float
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
            backlog=_BACKLOG,
        )
        self._socket = sock
        self._server = _QuietServer(config)
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
) -> HttpServer:
    """Start serving `app` on a socket of `bind_http`; the server owns and closes the socket."""
    server = HttpServer(app, sock, limits or HttpLimits(), drain_s)
    await server.start()
    return server


class _QuietServer(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the process."""
        yield
