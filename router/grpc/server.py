"""The gateway's gRPC server: caps, keepalive, health and reflection around the servicer.

HTTP/2 by the h2 library on the gateway's own loop (decision 10). Nothing is left to defaults that a
client could lean on: message and metadata sizes, streams per connection, ping and reset rates.
SO_REUSEPORT lets several gateways share the port, so that one may die.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2_grpc
from grpc_reflection.v1alpha._async import ReflectionServicer
from grpc_reflection.v1alpha.reflection import SERVICE_NAME as REFLECTION_NAME

from cluster.base.front_plan import GatewayPlan
from router.access.front_access import FrontAccess
from router.access.tls_listener import TlsListener
from router.api import Handler
from router.grpc.call_gate import CallGate
from router.grpc.connection import GrpcConnection
from router.grpc.health import HandlerHealth
from router.grpc.method_table import MethodTable
from router.grpc.peer_conduct import ConnectionLimits
from router.grpc.servicer import MalformedRequest, PenstockServicer
from router.listen import BACKLOG, listening_socket
from router.proto import penstock_pb2 as pb

log = logging.getLogger(__name__)

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Penstock"].full_name
MAX_CONNECTIONS = 1024
"""Over it a new connection is told to go."""


class GrpcFront:
    """The running gRPC front of a gateway; made and started on its loop."""

    def __init__(self, handler: Handler, plan: GatewayPlan, access: FrontAccess) -> None:
        """`access`: who may call, and over what."""
        self._plan = plan
        self._health = HandlerHealth(handler, SERVICE_NAME)
        self._limits = ConnectionLimits(max_message_bytes=plan.limits.max_message_bytes)
        self._gate = CallGate(all_methods(handler, self._health), self._limits, access.guard)
        self._tls = access.tls
        self._connections: set[GrpcConnection] = set()
        self._all_gone = asyncio.Event()
        self._listener: asyncio.Server | TlsListener | None = None

    async def start(self) -> int:
        """Listen; returns the port (the plan's, or the one the system gave for 0).

        Raises:
            ConfigError: the address cannot be bound.
        """
        sock = listening_socket(self._plan.host, self._plan.grpc_port, "gateway.grpc_port")
        bound: int = sock.getsockname()[1]
        if self._tls is not None:
            self._listener = TlsListener(sock, self._connection, self._tls.grpc)
        else:
            loop = asyncio.get_running_loop()
            self._listener = await loop.create_server(self._connection, sock=sock, backlog=BACKLOG)
        self._health.start()
        return bound

    async def stop(self, grace_s: float) -> None:
        """Report NOT_SERVING, refuse new calls, let running ones finish for `grace_s`."""
        await self._health.stop()
        if self._listener is not None:
            self._listener.close()
        for connection in list(self._connections):
            connection.leave()
        if self._connections:
            self._all_gone.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self._all_gone.wait()
        for connection in list(self._connections):
            connection.abort()

    def _connection(self) -> GrpcConnection:
        return GrpcConnection(self._gate, self._limits, self)

    def enter(self, connection: GrpcConnection) -> bool:
        """A connection is made; whether it may stay."""
        self._connections.add(connection)
        return len(self._connections) <= MAX_CONNECTIONS

    def leave(self, connection: GrpcConnection) -> None:
        """A connection is lost."""
        self._connections.discard(connection)
        if not self._connections:
            self._all_gone.set()


def all_methods(handler: Handler, health: HandlerHealth) -> MethodTable:
    """Every method of every service."""
    table = MethodTable()
    servicer = PenstockServicer(handler)
    methods = {
        method.name: _method_handler(servicer, method)
        for method in pb.DESCRIPTOR.services_by_name["Penstock"].methods
    }
    table.add_registered_method_handlers(SERVICE_NAME, methods)
    health_pb2_grpc.add_HealthServicer_to_server(health, table)
    health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
    names = (SERVICE_NAME, health_name, REFLECTION_NAME)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(ReflectionServicer(names), table)
    return table


def _method_handler(servicer: PenstockServicer, method: MethodDescriptor) -> Any:
    request_class = message_factory.GetMessageClass(method.input_type)
    response_class = message_factory.GetMessageClass(method.output_type)
    make = (
        grpc.unary_stream_rpc_method_handler
        if method.server_streaming
        else grpc.unary_unary_rpc_method_handler
    )
    return make(
        getattr(servicer, method.name),
        request_deserializer=_tolerant_parser(request_class),
        response_serializer=response_class.SerializeToString,
    )


def _tolerant_parser(cls: type[Message]) -> Callable[[bytes], Message | MalformedRequest]:
    """A parser that hands bad bytes on as a value, for the servicer to answer."""

    def parse(raw: bytes) -> Message | MalformedRequest:
        try:
            return cls.FromString(raw)
        except DecodeError:
            return MalformedRequest(cls.DESCRIPTOR.full_name)

    return parse
