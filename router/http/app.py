"""The OpenAI-compatible HTTP front as one ASGI app over a `Handler`.

Order around an endpoint: `RequestGate` (head checks, request id, last fault boundary), then
routing, then the exception handlers that make every failure an OpenAI error body. Nothing here
knows about engines or Ray; any ASGI server can run it, `server.py` is ours.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp

from cluster.base.errors import PenstockError
from cluster.base.front_plan import GatewayPlan
from router.access.guard import OPEN, AccessGuard
from router.api import Handler
from router.http.endpoints import Endpoints
from router.http.errors import (
    ClientGoneError,
    HttpFaultError,
    answer_http_fault,
    answer_nobody,
    answer_penstock_error,
    answer_routing_error,
)
from router.http.gate import RequestGate
from router.http.limits import HttpLimits


def build_http_app(
    handler: Handler,
    plan: GatewayPlan,
    metrics: CollectorRegistry,
    *,
    limits: HttpLimits | None = None,
    guard: AccessGuard = OPEN,
) -> ASGIApp:
    """The app.

    Args:
        handler: does the work; shared with the gRPC front.
        plan: the gateway's slice of the plan.
        metrics: what /metrics prints.
        limits: transport limits; by default the plan's size of a body, and what suits production.
        guard: who may call.
    """
    bounds = limits or HttpLimits(max_body_bytes=plan.limits.max_message_bytes)
    endpoints = Endpoints(handler, plan.limits, bounds, metrics)
    app = Starlette(
        routes=_routes(endpoints),
        exception_handlers={
            PenstockError: answer_penstock_error,
            ClientGoneError: answer_nobody,
            HttpFaultError: answer_http_fault,
            HTTPException: answer_routing_error,
            Exception: answer_penstock_error,
        },
    )
    app.router.redirect_slashes = False
    return RequestGate(app, bounds, guard)


def _routes(endpoints: Endpoints) -> list[Route]:
    return [
        Route("/v1/completions", endpoints.completions, methods=["POST"]),
        Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
        Route("/v1/embeddings", endpoints.embeddings, methods=["POST"]),
        Route("/v1/models", endpoints.models, methods=["GET"]),
        Route("/v1/models/{name:path}", endpoints.model, methods=["GET"]),
        Route("/tokenize", endpoints.tokenize, methods=["POST"]),
        Route("/detokenize", endpoints.detokenize, methods=["POST"]),
        Route("/healthz", endpoints.health, methods=["GET"]),
        Route("/readyz", endpoints.ready, methods=["GET"]),
        Route("/metrics", endpoints.metrics, methods=["GET"]),
    ]
