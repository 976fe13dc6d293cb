"""The gateway's gRPC server: caps, keepalive, health and reflection around the servicer.

Nothing is left to grpcio's defaults that a client could lean on: message and metadata sizes,
streams per connection, ping rate. SO_REUSEPORT lets several gateways share the port, so that one
may die.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cluster.base.errors import ConfigError
from cluster.base.plan import GatewayPlan
from router.api import Handler
from router.grpc.health import HandlerHealth
from router.grpc.servicer import MalformedRequest, PenstockServicer
from router.proto import penstock_pb2 as pb

log = logging.getLogger(__name__)

MAX_METADATA_BYTES = 16 * 1024
MAX_STREAMS_PER_CONNECTION = 1024
SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Penstock"].full_name


class GrpcFront:
    """The running gRPC front of a gateway."""

    def __init__(
        self,
        handler: Handler,
        plan: GatewayPlan,
        *,
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        """`credentials` switches TLS on."""
        self._plan = plan
        self._credentials = credentials
        self._health = HandlerHealth(handler, SERVICE_NAME)
        self._server = build_grpc_server(handler, plan, health=self._health)

    async def start(self) -> int:
        """Listen; returns the port (the plan's, or the one the system gave for 0).

        Raises:
            ConfigError: the address cannot be bound.
        """
        address = f"{self._plan.host}:{self._plan.grpc_port}"
        try:
            if self._credentials is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, self._credentials)
        except RuntimeError as error:
            raise ConfigError(
                f"The gRPC front cannot listen on {address}: {error}.",
                "Choose a free port or stop what uses it.",
                param="gateway.grpc_port",
            ) from error
        await self._server.start()
        self._health.start()
        return port

    async def stop(self, grace_s: float) -> None:
        """Report NOT_SERVING, refuse new calls, let running ones finish for `grace_s`."""
        await self._health.stop()
        await self._server.stop(grace_s)


def build_grpc_server(
    handler: Handler, plan: GatewayPlan, *, health: HandlerHealth
) -> grpc.aio.Server:
    """A server with every service registered and no port yet."""
    server = grpc.aio.server(options=server_options(plan))
    server.add_generic_rpc_handlers((_service_handler(PenstockServicer(handler)),))
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    names = (SERVICE_NAME, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
    reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), server)
    return server


def server_options(plan: GatewayPlan) -> list[tuple[str, int]]:
    """Channel options of the public server."""
    return [
        ("grpc.so_reuseport", 1),
        ("grpc.max_receive_message_length", plan.limits.max_message_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.max_concurrent_streams", MAX_STREAMS_PER_CONNECTION),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 2),
    ]


def _service_handler(servicer: PenstockServicer) -> grpc.GenericRpcHandler[Any, Any]:
    methods = {
        method.name: _method_handler(servicer, method)
        for method in pb.DESCRIPTOR.services_by_name["Penstock"].methods
    }
    return grpc.method_handlers_generic_handler(SERVICE_NAME, methods)


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
