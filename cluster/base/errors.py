"""The one error hierarchy: every failure a user can meet has a code, a cause and a remedy.

`code` is stable and is what both fronts, the command line and the logs print; the table from code
to HTTP and gRPC status lives in `router/error_map.py`. Errors cross process boundaries (Ray,
the replica stream) as `to_dict()` and come back through `error_from_dict`, so the root cause of a
child reaches the caller. User input never meets `assert`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class PenstockError(Exception):
    """Base of every error that Penstock raises on purpose.

    Args:
        cause: what happened, in one sentence a user understands.
        remedy: what the user can do about it; empty when there is nothing to do but retry.
        param: the request field or YAML key path at fault, if there is one.
    """

    code: ClassVar[str] = "internal"

    def __init__(self, cause: str, remedy: str = "", *, param: str | None = None) -> None:
        super().__init__(cause)
        self.cause = cause
        self.remedy = remedy
        self.param = param

    def __str__(self) -> str:
        return f"{self.cause} {self.remedy}".strip()

    def __reduce__(self) -> tuple[object, ...]:
        return error_from_dict, (self.to_dict(),)

    def to_dict(self) -> dict[str, str | None]:
        """A flat form for wires and logs; `error_from_dict` is its inverse."""
        return {
            "code": self.code,
            "cause": self.cause,
            "remedy": self.remedy,
            "param": self.param,
        }


class UserError(PenstockError):
    """The caller can mend this; retrying unchanged cannot help."""

    code = "user_error"


class ConfigError(UserError):
    """A cluster file, flag or checkpoint configuration is wrong."""

    code = "config_invalid"


class InvalidRequestError(UserError):
    """A request field is missing, mistyped, out of range or not supported."""

    code = "invalid_request"


class ContextTooLongError(UserError):
    """Prompt plus requested tokens exceed what the model or its KV memory can hold."""

    code = "context_too_long"


class UnknownModelError(UserError):
    """No served model has that name."""

    code = "unknown_model"


class UnauthenticatedError(UserError):
    """The caller has not shown who he is, or nobody knows him."""

    code = "unauthenticated"


class OverloadedError(PenstockError):
    """Admission refused the request; retry after `retry_after_s`."""

    code = "overloaded"

    def __init__(
        self, cause: str, remedy: str = "", *, param: str | None = None, retry_after_s: float = 1.0
    ) -> None:
        super().__init__(cause, remedy, param=param)
        self.retry_after_s = retry_after_s


class DeadlineExceededError(PenstockError):
    """The request's own deadline passed; its work was stopped."""

    code = "deadline_exceeded"


class CancelledError(PenstockError):
    """The caller cancelled the request."""

    code = "cancelled"


class UnavailableError(PenstockError):
    """No replica can take the request now (starting, draining or lost); retry later."""

    code = "unavailable"


class InternalError(PenstockError):
    """A fault of ours; the log holds the details under the request id."""

    code = "internal"


class WorkerDiedError(InternalError):
    """A worker rank exited or was killed."""

    code = "worker_died"


class CollectiveTimeoutError(InternalError):
    """A rank did not finish its step, or a collective, within the deadline."""

    code = "collective_timeout"


class DeviceOutOfMemoryError(InternalError):
    """A device ran out of memory although the plan said it would fit."""

    code = "out_of_memory"


class WeightStreamError(InternalError):
    """Streamed weights could not be read in time, or not at all."""

    code = "weight_stream"


class CorruptWeightsError(InternalError):
    """A checkpoint file is damaged or does not match its configuration."""

    code = "corrupt_weights"


_BY_CODE: dict[str, type[PenstockError]] = {
    cls.code: cls
    for cls in (
        UserError,
        ConfigError,
        InvalidRequestError,
        ContextTooLongError,
        UnknownModelError,
        UnauthenticatedError,
        OverloadedError,
        DeadlineExceededError,
        CancelledError,
        UnavailableError,
        InternalError,
        WorkerDiedError,
        CollectiveTimeoutError,
        DeviceOutOfMemoryError,
        WeightStreamError,
        CorruptWeightsError,
    )
}


def error_from_dict(fields: Mapping[str, str | None]) -> PenstockError:
    """Rebuild an error from `to_dict()`; an unknown code becomes `InternalError`."""
    cls = _BY_CODE.get(fields.get("code") or "", InternalError)
    return cls(
        fields.get("cause") or "unknown failure",
        fields.get("remedy") or "",
        param=fields.get("param"),
    )
