"""What a call's headers ask for, and whether it may begin; decided before anything else of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from cluster.base.errors import UnauthenticatedError
from cluster.base.ids import new_request_id
from router.access.guard import AccessGuard
from router.error_map import status_of
from router.grpc import call_framing as framing
from router.grpc.call_framing import CallError, Header, MessageReader
from router.grpc.method_table import Method, MethodTable
from router.grpc.peer_conduct import ConnectionLimits
from router.grpc.status_details import trailing_metadata

_OPEN_SERVICE = b"/grpc.health.v1.Health/"
"""Balancers and probes come without a key. Reflection tells what is served here and needs one."""


@dataclass(frozen=True, slots=True)
class CallHead:
    """A call that may begin."""

    method: Method
    reader: MessageReader
    timeout_s: float | None
    """The client's own deadline."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """The whole answer to a call that may not."""

    headers: list[Header]


class CallGate:
    """Looks at the headers of every call of the front."""

    def __init__(self, methods: MethodTable, limits: ConnectionLimits, guard: AccessGuard) -> None:
        self._methods = methods
        self._limits = limits
        self._guard = guard

    def admit(self, fields: Sequence[Header], *, has_certificate: bool) -> CallHead | Refusal:
        """Let a call begin, or say what to answer instead.

        Args:
            has_certificate: whether its connection has shown a client certificate.
        """
        if not _first(fields, b"content-type").startswith(b"application/grpc"):
            return Refusal([(b":status", b"415")])
        try:
            head = self._head(fields)
            if not _first(fields, b":path").startswith(_OPEN_SERVICE):
                shown = [value for name, value in fields if name == b"authorization"]
                self._guard.check(shown, has_certificate=has_certificate)
            return head
        except CallError as error:
            return _refusal(error.code, error.text)
        except UnauthenticatedError as error:
            details = framing.metadata_headers(trailing_metadata(error, new_request_id()))
            return _refusal(status_of(error).grpc, str(error), details)

    def _head(self, fields: Sequence[Header]) -> CallHead:
        """Raises CallError: too large, no such method, unknown encoding, malformed timeout."""
        limits = self._limits
        size = sum(len(name) + len(value) + 32 for name, value in fields)
        if size > limits.max_metadata_bytes:
            text = f"The metadata has {size} bytes; the limit is {limits.max_metadata_bytes}."
            raise CallError(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        headers = dict(fields)
        method = self._methods.find(headers.get(b":path", b""))
        if method is None or headers.get(b":method") != b"POST":
            raise CallError(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        encoding = headers.get(b"grpc-encoding", b"")
        framing.check_encoding(encoding)
        timeout = headers.get(b"grpc-timeout")
        seconds = framing.timeout_s(timeout) if timeout is not None else None
        return CallHead(method, MessageReader(limits.max_message_bytes, encoding), seconds)


def _refusal(code: grpc.StatusCode, text: str, details: Sequence[Header] = ()) -> Refusal:
    first = [(b":status", b"200"), (b"content-type", b"application/grpc")]
    return Refusal([*first, *framing.status_headers(code, text), *details])


def _first(fields: Sequence[Header], wanted: bytes) -> bytes:
    return next((value for name, value in fields if name == wanted), b"")
