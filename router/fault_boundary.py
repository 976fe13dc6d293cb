"""Keeps a fault of ours inside the one request that met it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.base.errors import InternalError, PenstockError

log = logging.getLogger(__name__)


@contextmanager
def fault_boundary(request_id: str) -> Iterator[None]:
    """Let coded errors pass; log any other one and show the client its request id alone.

    Raises:
        InternalError: in place of an exception that is no `PenstockError`.
    """
    try:
        yield
    except PenstockError:
        raise
    except Exception:
        log.exception("request %s failed in the gateway", request_id)
        raise InternalError(
            f"The gateway failed on request {request_id}; its log has the details."
        ) from None
