"""What the cluster file says about sizes holds on HTTP too."""

import dataclasses

import httpx
from scripted_handler import gateway_plan

from router.http.app import build_http_app


async def test_the_plan_bounds_the_body(handler, registry):
    plan = gateway_plan()
    limits = dataclasses.replace(plan.limits, max_message_bytes=70_000)
    app = build_http_app(handler, dataclasses.replace(plan, limits=limits), registry)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answers = [
            await client.post("/tokenize", json={"model": "m", "prompt": "a" * size})
            for size in (60_000, 80_000)
        ]
    assert answers[0].status_code != 413
    assert answers[1].status_code == 413
