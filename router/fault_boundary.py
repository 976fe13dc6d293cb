"""Keeps a fault of ours inside the one request that met it."""

from __future__ import annotations

import logging
from types import TracebackType

from cluster.base.errors import InternalError, PenstockError

log = logging.getLogger(__name__)


class fault_boundary:  # noqa: N801 (used as a statement; entered once per piece, so no generator)
    """Let coded errors pass; log any other one and show the client its request id alone.

    Raises:
        InternalError: in place of an exception that is no `PenstockError`.
    """

    __slots__ = ("_request_id",)

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id

    def __enter__(self) -> None:
        """Nothing to set up."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not isinstance(error, Exception) or isinstance(error, PenstockError):
            return
        log.error("request %s failed in the gateway", self._request_id, exc_info=error)
        raise InternalError(
            f"The gateway failed on request {self._request_id}; its log has the details."
        ) from None
