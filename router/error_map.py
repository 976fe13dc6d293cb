"""The one table from error code to what each front answers.

Both fronts print a `PenstockError` through `status_of`; no other file names an HTTP or gRPC status
for a failure. Overload is 429 / RESOURCE_EXHAUSTED (back off and retry here), broken or starting is
503 / UNAVAILABLE: load balancers eject a backend for the second, not for the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import grpc

from cluster.base.errors import PenstockError


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorStatus:
    """How one error code looks on the wire."""

    grpc: grpc.StatusCode
    http: int
    openai_type: str
    """`error.type` of an OpenAI error body; `error.code` is the code itself."""
    retryable: bool = False


_INTERNAL = ErrorStatus(grpc=grpc.StatusCode.INTERNAL, http=500, openai_type="server_error")
_BAD_REQUEST = ErrorStatus(
    grpc=grpc.StatusCode.INVALID_ARGUMENT, http=400, openai_type="invalid_request_error"
)
_UNAVAILABLE = ErrorStatus(
    grpc=grpc.StatusCode.UNAVAILABLE, http=503, openai_type="server_error", retryable=True
)

ERROR_STATUS: Mapping[str, ErrorStatus] = MappingProxyType(
    {
        "user_error": _BAD_REQUEST,
        "config_invalid": _BAD_REQUEST,
        "invalid_request": _BAD_REQUEST,
        "context_too_long": _BAD_REQUEST,
        "unknown_model": ErrorStatus(
            grpc=grpc.StatusCode.NOT_FOUND, http=404, openai_type="invalid_request_error"
        ),
        "unauthenticated": ErrorStatus(
            grpc=grpc.StatusCode.UNAUTHENTICATED, http=401, openai_type="invalid_request_error"
        ),
        "overloaded": ErrorStatus(
            grpc=grpc.StatusCode.RESOURCE_EXHAUSTED,
            http=429,
            openai_type="rate_limit_error",
            retryable=True,
        ),
        "deadline_exceeded": ErrorStatus(
            grpc=grpc.StatusCode.DEADLINE_EXCEEDED, http=408, openai_type="timeout_error"
        ),
        "cancelled": ErrorStatus(
            grpc=grpc.StatusCode.CANCELLED, http=499, openai_type="cancelled_error"
        ),
        "unavailable": _UNAVAILABLE,
        # The replica is being replaced: the same request can succeed elsewhere or later.
        "worker_died": _UNAVAILABLE,
        "collective_timeout": _UNAVAILABLE,
        "weight_stream": _UNAVAILABLE,
        "internal": _INTERNAL,
        "out_of_memory": _INTERNAL,
        "corrupt_weights": _INTERNAL,
    }
)


def status_of(error: PenstockError) -> ErrorStatus:
    """The wire form of `error`; an unlisted code is an internal error."""
    return ERROR_STATUS.get(error.code, _INTERNAL)
