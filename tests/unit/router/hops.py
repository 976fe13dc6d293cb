"""Streams to replicas as tests open them, and a leader that follows a script."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cluster.base.errors import UnavailableError
from replicas.api import GenerationRequest
from router.hop_settings import HopSettings
from router.loss import Loss
from router.replica_stream import ReplicaStream
from router.request_channel import RequestChannel

FAST = HopSettings(backoff_initial_s=0.01, backoff_max_s=0.05, silence_timeout_s=5.0)


@asynccontextmanager
async def hop_to(
    endpoint: str, epoch: str = "e1", settings: HopSettings = FAST, gateway_id: str = "gw"
) -> AsyncIterator[ReplicaStream]:
    """A stream that has begun to connect; closed at the end."""
    stream = ReplicaStream(endpoint, epoch, gateway_id=gateway_id, settings=settings)
    stream.start()
    try:
        yield stream
    finally:
        await stream.close(UnavailableError("closing"))


@asynccontextmanager
async def scripted_leader(*said: bytes) -> AsyncIterator[str]:
    """A leader that answers a hello with these bytes and then only listens; its endpoint."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1 << 16)
        writer.write(b"".join(said))
        while await reader.read(1 << 16):
            pass
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    try:
        yield f"{host}:{port}"
    finally:
        server.close()


def submit(stream: ReplicaStream, request: GenerationRequest, limit: int = 1024) -> RequestChannel:
    """A request that ends when its replica is lost."""
    channel = RequestChannel(request, limit=limit, on_loss=_fail)
    stream.submit(request, channel)
    return channel


def _fail(channel: RequestChannel, loss: Loss) -> None:
    channel.fail(loss.error)
