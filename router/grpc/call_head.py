"""What a call's headers ask for, checked; pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from router.grpc import call_framing as framing
from router.grpc.call_framing import CallError, Header, MessageReader
from router.grpc.method_table import Method, MethodTable
from router.grpc.peer_conduct import ConnectionLimits


@dataclass(frozen=True, slots=True)
class CallHead:
    """A call that may begin."""

    method: Method
    reader: MessageReader
    timeout_s: float | None
    """The client's own deadline."""


def call_head(fields: Sequence[Header], methods: MethodTable, limits: ConnectionLimits) -> CallHead:
    """Check the headers of a gRPC request.

    Raises:
        CallError: too large, no such method, an unknown encoding, or a malformed timeout.
    """
    size = sum(len(name) + len(value) + 32 for name, value in fields)
    if size > limits.max_metadata_bytes:
        text = f"The metadata has {size} bytes; the limit is {limits.max_metadata_bytes}."
        raise CallError(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
    headers = dict(fields)
    method = methods.find(headers.get(b":path", b""))
    if method is None or headers.get(b":method") != b"POST":
        raise CallError(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
    encoding = headers.get(b"grpc-encoding", b"")
    framing.check_encoding(encoding)
    timeout = headers.get(b"grpc-timeout")
    seconds = framing.timeout_s(timeout) if timeout is not None else None
    return CallHead(method, MessageReader(limits.max_message_bytes, encoding), seconds)
