"""The outermost layer: refuses bad heads, names every request, lets no exception out.

Adds X-Request-Id to every answer.
"""

from __future__ import annotations

import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.http.errors import error_body
from router.http.json_text import json_bytes
from router.http.limits import HttpLimits
from router.http.request_head import assign_request_id, head_fault

_LOG = logging.getLogger(__name__)


class RequestGate:
    """ASGI middleware around the whole app."""

    def __init__(self, app: ASGIApp, limits: HttpLimits) -> None:
        self._app = app
        self._limits = limits

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
            await _refuse(send_with_id, *fault)
            return
        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            # Answered where it was raised, if anything could still be answered.
            _LOG.exception("request %s: unexpected failure", request_id)


async def _refuse(send: Send, status: int, code: str, message: str) -> None:
    body = json_bytes(error_body(message, "invalid_request_error", None, code))
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode("ascii")),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
