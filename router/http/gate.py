"""The outermost layer: refuses bad heads and strangers, names every request, lets no exception out.

Adds X-Request-Id to every answer.
"""

from __future__ import annotations

import logging
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.base.errors import UnauthenticatedError
from router.access.guard import OPEN, AccessGuard
from router.error_map import status_of
from router.http.errors import error_body, penstock_error_body
from router.http.json_text import json_bytes
from router.http.limits import HttpLimits
from router.http.request_head import (
    assign_request_id,
    head_fault,
    header_values,
    shows_certificate,
)

_LOG = logging.getLogger(__name__)

_OPEN_PATHS = frozenset({"/healthz", "/readyz", "/metrics"})
"""Balancers, probes and scrapers come without a key; what they are told is no request's content."""
_CHALLENGE = (b"www-authenticate", b'Bearer realm="penstock"')


class RequestGate:
    """ASGI middleware around the whole app."""

    def __init__(self, app: ASGIApp, limits: HttpLimits, guard: AccessGuard = OPEN) -> None:
        self._app = app
        self._limits = limits
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection scope; only HTTP is served."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1003})
            return
        request_id = assign_request_id(scope)
        id_header = (b"x-request-id", request_id.encode("ascii"))

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], id_header]}
            await send(message)

        fault = head_fault(scope, self._limits)
        if fault is not None:
            status, code, message = fault
            body = error_body(message, "invalid_request_error", None, code)
            await _refuse(send_with_id, status, body)
            return
        try:
            if scope["path"] not in _OPEN_PATHS:
                authorization = header_values(scope, b"authorization")
                self._guard.check(authorization, has_certificate=shows_certificate(scope))
            await self._app(scope, receive, send_with_id)
        except UnauthenticatedError as error:
            body = penstock_error_body(error, request_id)
            await _refuse(send_with_id, status_of(error).http, body, _CHALLENGE)
        except Exception:
            # Answered where it was raised, if anything could still be answered.
            _LOG.exception("request %s: unexpected failure", request_id)


async def _refuse(
    send: Send, status: int, body: dict[str, Any], *headers: tuple[bytes, bytes]
) -> None:
    text = json_bytes(body)
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(text)).encode("ascii")),
                (b"connection", b"close"),
                *headers,
            ],
        }
    )
    await send({"type": "http.response.body", "body": text, "more_body": False})
