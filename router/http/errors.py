"""Failures as OpenAI error bodies: {"error": {"message", "type", "param", "code"}}.

Codes and statuses of `PenstockError` come from the shared table in `router/error_map.py`; only what
concerns HTTP itself (method, media type, size, time) has its status here. An internal failure shows
the request id, never the exception's text.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cluster.base.errors import InternalError, OverloadedError, PenstockError
from router.error_map import ErrorStatus, status_of
from router.http.request_head import request_id_of

_LOG = logging.getLogger(__name__)

_UNAVAILABLE_RETRY_S = 1
_CLIENT_CLOSED = 499


class HttpFaultError(Exception):
    """A request that HTTP itself forbids; `close` ends the connection after the answer."""

    def __init__(self, status: int, code: str, message: str, *, close: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.close = close


class ClientGoneError(Exception):
    """The client closed the connection: nobody is left to answer."""


def error_body(message: str, kind: str, param: str | None, code: str) -> dict[str, Any]:
    """The JSON shape that OpenAI clients parse."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def penstock_error_body(error: PenstockError, request_id: str) -> dict[str, Any]:
    """The body for an error of ours; logs it when it is our fault."""
    status = status_of(error)
    message = str(error)
    if status.http == 500:
        _LOG.error("request %s failed", request_id, exc_info=error)
        message = f"The server failed on this request; its log has the details under {request_id}."
    return error_body(message, status.openai_type, error.param, error.code)


def as_penstock_error(error: Exception) -> PenstockError:
    """`error` itself, or an `InternalError` that carries it as its cause."""
    if isinstance(error, PenstockError):
        return error
    wrapped = InternalError(f"{type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped


async def answer_penstock_error(request: Request, error: Exception) -> JSONResponse:
    """Exception handler for every error that has no other."""
    known = as_penstock_error(error)
    status = status_of(known)
    return JSONResponse(
        penstock_error_body(known, request_id_of(request.scope)),
        status_code=status.http,
        headers=_retry_headers(known, status),
    )


async def answer_http_fault(request: Request, error: Exception) -> JSONResponse:
    """Exception handler for `HttpFaultError`."""
    fault = error if isinstance(error, HttpFaultError) else HttpFaultError(500, "internal", "")
    body = error_body(fault.message, "invalid_request_error", None, fault.code)
    headers = {"connection": "close"} if fault.close else None
    return JSONResponse(body, status_code=fault.status, headers=headers)


async def answer_routing_error(request: Request, error: Exception) -> JSONResponse:
    """Exception handler for unknown paths and methods; says which ones there are."""
    known = error if isinstance(error, HTTPException) else HTTPException(500)
    code, message = "invalid_request", str(known.detail)
    if known.status_code == 404:
        code, message = "unknown_path", f"No such path. There are: {_paths(request)}."
    elif known.status_code == 405:
        allowed = (known.headers or {}).get("Allow", "another one")
        code = "method_not_allowed"
        message = f"This path does not take {request.method}. Use {allowed}."
    body = error_body(message, "invalid_request_error", None, code)
    return JSONResponse(body, status_code=known.status_code, headers=known.headers)


async def answer_nobody(request: Request, error: Exception) -> Response:
    """Exception handler for `ClientGoneError`: the server drops what is sent now."""
    return Response(status_code=_CLIENT_CLOSED)


def _paths(request: Request) -> str:
    """Every path of the app, with its methods."""
    return ", ".join(
        f"{'/'.join(sorted((route.methods or set()) - {'HEAD'}))} {route.path_format}"
        for route in request.app.routes
        if isinstance(route, Route)
    )


def _retry_headers(error: PenstockError, status: ErrorStatus) -> dict[str, str]:
    if isinstance(error, OverloadedError):
        return {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
    if status.http in (429, 503):
        return {"retry-after": str(_UNAVAILABLE_RETRY_S)}
    return {}
