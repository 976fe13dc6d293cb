import contextlib

import pytest
from prometheus_client import CollectorRegistry, Counter
from scripted_handler import ScriptedHandler, gateway_plan

from router.http.app import build_http_app
from router.http.limits import HttpLimits
from router.http.server import serve_http
from router.listen import listening_socket


@pytest.fixture
def handler(tmp_path):
    return ScriptedHandler.from_directory(tmp_path)


@pytest.fixture
def registry():
    registry = CollectorRegistry()
    Counter("penstock_probe", "A probe.", registry=registry).inc()
    return registry


@pytest.fixture
def app(handler, registry):
    return build_http_app(handler, gateway_plan(), registry)


@pytest.fixture
async def base_url(app):
    async with serving(app) as server:
        yield f"http://127.0.0.1:{server.port}"


@contextlib.asynccontextmanager
async def serving(app, limits=None, drain_s=1.0):
    server = await serve_http(
        app, listening_socket("127.0.0.1", 0, "gateway.http_port"), limits=limits, drain_s=drain_s
    )
    try:
        yield server
    finally:
        await server.stop()


@pytest.fixture
def serve(handler, registry):
    """Serve the handler with other limits: `async with serve(head_timeout_s=1) as server`."""

    def start(drain_s=1.0, **changes):
        limits = HttpLimits(**changes)
        app = build_http_app(handler, gateway_plan(), registry, limits=limits)
        return serving(app, limits, drain_s)

    return start
