"""The rule for exceptions that nobody planned for: a code for the caller, details for the log."""

from __future__ import annotations

from cluster.base.errors import InternalError, PenstockError


def as_penstock_error(error: Exception) -> PenstockError:
    """The error itself when it has a code; else an `InternalError` that names its type only.

    The text of an unplanned exception may hold what a stranger should not read, so it stays in
    `__cause__`, for the log.
    """
    if isinstance(error, PenstockError):
        return error
    wrapped = InternalError(f"The engine met an unexpected {type(error).__name__}.")
    wrapped.__cause__ = error
    return wrapped
