"""Coded errors <-> gRPC status: code, text, google.rpc details and trailing metadata.

Both ends are here, so a client gets back the very error the gateway raised. The text of a status is
the error's own cause and remedy, never that of a Python exception.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from cluster.base.errors import (
    CancelledError,
    DeadlineExceededError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    PenstockError,
    UnauthenticatedError,
    UnavailableError,
    UnknownModelError,
    error_from_dict,
)
from router.error_map import status_of

REQUEST_ID_KEY = "penstock-request-id"
ERROR_CODE_KEY = "penstock-error-code"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
DETAILS_KEY = "grpc-status-details-bin"
DOMAIN = "penstock"

_MAX_TEXT = 2000
"""Characters of a cause or remedy; the trailing metadata has to stay under the peer's cap."""

Metadata = tuple[tuple[str, str | bytes], ...]

_BY_STATUS: tuple[tuple[grpc.StatusCode, type[PenstockError]], ...] = (
    (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequestError),
    (grpc.StatusCode.NOT_FOUND, UnknownModelError),
    (grpc.StatusCode.UNAUTHENTICATED, UnauthenticatedError),
    (grpc.StatusCode.RESOURCE_EXHAUSTED, OverloadedError),
    (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceededError),
    (grpc.StatusCode.CANCELLED, CancelledError),
    (grpc.StatusCode.UNAVAILABLE, UnavailableError),
)


_WITHOUT_DETAILS: dict[grpc.StatusCode, tuple[str, str]] = {
    grpc.StatusCode.DEADLINE_EXCEEDED: (
        "There was no whole answer within the deadline of the call.",
        "Allow more time, or ask for fewer tokens.",
    ),
    grpc.StatusCode.UNAVAILABLE: (
        "No gateway answers: {}.",
        "Check the address and whether it speaks TLS; `penstock status` says what runs here.",
    ),
}
"""Cause and remedy of what the caller's own gRPC library noticed; `{}` is what it says."""


def trailing_metadata(error: PenstockError, request_id: str) -> Metadata:
    """What goes out beside the status of a failed call."""
    metadata: list[tuple[str, str | bytes]] = [
        (ERROR_CODE_KEY, error.code),
        (REQUEST_ID_KEY, request_id),
        (DETAILS_KEY, _details(error, request_id).SerializeToString()),
    ]
    if isinstance(error, OverloadedError):
        metadata.append((PUSHBACK_KEY, str(round(1000 * error.retry_after_s))))
    return tuple(metadata)


def _details(error: PenstockError, request_id: str) -> status_pb2.Status:
    info = error_details_pb2.ErrorInfo(
        reason=error.code,
        domain=DOMAIN,
        metadata={
            "request_id": request_id,
            "cause": error.cause[:_MAX_TEXT],
            "remedy": error.remedy[:_MAX_TEXT],
        },
    )
    details = [info]
    if error.param is not None:
        info.metadata["param"] = error.param
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.param, description=error.cause[:_MAX_TEXT]
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, OverloadedError):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(round(1000 * error.retry_after_s))
        details.append(retry)
    status = status_pb2.Status(code=status_of(error).grpc.value[0], message=str(error)[:_MAX_TEXT])
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def error_from_status(
    code: grpc.StatusCode, text: str, trailing: Iterable[Any] | None
) -> PenstockError:
    """The error behind a failed call; from the status code alone when it carries no details.

    `trailing` are the call's metadata pairs.
    """
    for key, value in trailing or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            error = _error_from_details(value)
            if error is not None:
                return error
    for status, cls in _BY_STATUS:
        if status is code:
            cause, remedy = _WITHOUT_DETAILS.get(code, ("{}", ""))
            return cls(cause.format(text.rstrip(".") or code.name), remedy)
    return InternalError(f"{code.name}: {text}")


def _error_from_details(raw: bytes) -> PenstockError | None:
    status = status_pb2.Status()
    try:
        status.ParseFromString(raw)
    except DecodeError:
        return None
    error: PenstockError | None = None
    for packed in status.details:
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if packed.Unpack(info) and info.domain == DOMAIN:
            fields = {name: info.metadata.get(name) for name in ("cause", "remedy", "param")}
            error = error_from_dict({"code": info.reason, **fields})
        elif packed.Unpack(retry) and isinstance(error, OverloadedError):
            error.retry_after_s = retry.retry_delay.ToMilliseconds() / 1000
    return error
