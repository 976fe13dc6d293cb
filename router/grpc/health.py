"""`grpc.health.v1` that says what `handler.ready()` says.

Check asks the handler itself. Watchers all wait for one event that one task sets when the answer
changes, so a thousand of them cost what one does; none holds a lock while it writes, so one that
does not read cannot delay the others.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from router.api import Handler

POLL_PERIOD_S = 0.25

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HandlerHealth(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Health of the whole server ("") and of the named service, which are one here."""

    def __init__(self, handler: Handler, service_name: str) -> None:
        self._handler = handler
        self._names = ("", service_name)
        self._stopping = False
        self._serving = False
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin telling watchers of changes; returns at once."""
        self._task = asyncio.create_task(self._poll(), name="grpc-health")

    async def stop(self) -> None:
        """Report NOT_SERVING from now on, and end the task."""
        self._stopping = True
        self._refresh()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802 (the proto's name)
        """The status now."""
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, "This service is not known here.")
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802
        """The status now and after every change."""
        last = None
        while True:
            changed = self._changed
            status = self._status(request.service)
            if status != last:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                last = status
            await changed.wait()

    def _status(self, name: str) -> Any:
        if name not in self._names:
            return _UNKNOWN
        self._refresh()
        return _SERVING if self._serving else _NOT_SERVING

    def _refresh(self) -> None:
        serving = self._handler.ready() and not self._stopping
        if serving != self._serving:
            self._serving = serving
            # Waiters hold the event they began to wait for; later ones get a new one.
            self._changed.set()
            self._changed = asyncio.Event()

    async def _poll(self) -> None:
        while True:
            self._refresh()
            await asyncio.sleep(POLL_PERIOD_S)
