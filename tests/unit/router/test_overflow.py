"""Requests that a model's replicas cannot take: what goes over, when, and what clients hear."""

from __future__ import annotations

from dataclasses import replace

import grpc.aio
import pytest
from fake_engine import FakeEngine
from gateway_harness import model_plan, running_gateway, until

from cluster.base.errors import ContextTooLongError, UnavailableError
from cluster.base.plan import EngineKind, ModelPlan, OverflowPlan, SpeedPlan, SpeedPoint
from router.api import GenerationInput
from router.client import AsyncPenstockClient
from router.overflow import Overflow, choose_tier
from router.policies.snapshot import ReplicaView
from router.proto import penstock_pb2 as pb
from router.proto import penstock_pb2_grpc as pb_grpc
from router.served_model import serve_models

SMALL, LARGE = "small", "large"
SPEED = SpeedPlan(
    chosen=SpeedPoint(
        micro_batch_tokens=0,
        kv_home="device",
        rows=4,
        tokens_per_s=10.0,
        tpot_s=0.4,
        resident_layers=1,
        precision="native",
        bound="disk",
    ),
    ttft_s=1.0,
    prompt_tokens=10,
    context_tokens=10,
    disk_bytes=1,
    host_bytes=0,
    rates={},
    frontier=(),
)


def plans(checkpoint, waiting: int = 2) -> tuple[ModelPlan, ModelPlan]:
    """A resident model of 64 tokens with one running request, and a streamed one of 512."""
    plan = model_plan(checkpoint)
    limits = replace(plan.scheduler, max_context=64, max_running_requests=1)
    small = replace(
        plan,
        name=SMALL,
        scheduler=limits,
        overflow=OverflowPlan(model=LARGE, waiting=waiting),
    )
    large = replace(
        plan,
        name=LARGE,
        engine=EngineKind.OFFLOAD,
        scheduler=replace(plan.scheduler, max_context=512, max_waiting_requests=3),
        speed=SPEED,
    )
    return small, large


def view(replica: str, **numbers: int) -> ReplicaView:
    return ReplicaView(replica_id=replica, **numbers)


FREE = [view("l0")]


@pytest.mark.parametrize(
    ("num_tokens", "small", "large", "expected"),
    [
        (64, [view("s0")], FREE, (SMALL, None)),
        (65, [view("s0")], FREE, (LARGE, Overflow.TOO_LONG)),
        (65, [view("s0")], [], (LARGE, Overflow.TOO_LONG)),
        (9999, [view("s0")], FREE, (LARGE, Overflow.TOO_LONG)),
        (5, [view("s0", num_waiting=2)], FREE, (LARGE, Overflow.BUSY)),
        (5, [view("s0", num_waiting=1)], FREE, (SMALL, None)),
        (5, [view("s0", num_waiting=9), view("s1", num_waiting=1)], FREE, (SMALL, None)),
        # One runs and two wait, of which no report tells yet.
        (5, [view("s0", num_in_flight=3)], FREE, (LARGE, Overflow.BUSY)),
        (5, [view("s0", num_waiting=9)], [view("l0", num_waiting=3)], (SMALL, None)),
        (5, [], FREE, (LARGE, Overflow.UNAVAILABLE)),
        (5, [], [], (SMALL, None)),
    ],
)
def test_a_request_goes_over_only_when_it_must_and_can(
    checkpoint, num_tokens, small, large, expected
) -> None:
    models = serve_models(plans(checkpoint))
    views = {SMALL: small, LARGE: large}
    chosen, reason = choose_tier(models[SMALL], num_tokens, views.__getitem__)
    assert (chosen.plan.name, reason) == expected
    assert choose_tier(models[LARGE], num_tokens, lambda _: pytest.fail("no choice")) == (
        models[LARGE],
        None,
    )


async def metadata(gateway, **request) -> dict[str, str]:
    """What the headers of an answer say; the answer is read to its end."""
    async with grpc.aio.insecure_channel(gateway.target) as channel:
        call = pb_grpc.PenstockStub(channel).Generate(pb.GenerateRequest(**request))
        first = dict(await call.initial_metadata())
        async for _ in call:
            pass
        return {key: value for key, value in first.items() if key.startswith("penstock-")}


async def test_long_requests_run_on_the_larger_tier_and_say_so(checkpoint) -> None:
    engines = [FakeEngine(), FakeEngine()]
    sampling = pb.SamplingOptions(max_tokens=10)
    async with running_gateway(checkpoint, engines=engines, plans=plans(checkpoint)) as gateway:
        short = await metadata(gateway, model=SMALL, text="x" * 54, sampling=sampling)
        long = await metadata(gateway, model=SMALL, text="x" * 55, sampling=sampling)
        ids = pb.TokenIds(ids=[1] * 400)
        longer = await metadata(gateway, model=SMALL, token_ids=ids, sampling=sampling)
        asked = await metadata(gateway, model=LARGE, text="x", sampling=sampling)
        assert [len(engine.requests) for engine in engines] == [1, 3]
        async with AsyncPenstockClient(gateway.target) as client:
            with pytest.raises(ContextTooLongError, match="512 tokens that 'large' holds"):
                await client.generate(SMALL, [1] * 513).result()
        with pytest.raises(ContextTooLongError, match="512 tokens"):
            await gateway.handler.generate(GenerationInput(model=SMALL, text="x " * 50_000))
    for said in (short, long, longer, asked):
        assert said.pop("penstock-request-id")
    assert short == {"penstock-served-by": SMALL, "penstock-engine": "tensor_parallel"}
    streamed = {
        "penstock-served-by": LARGE,
        "penstock-engine": "offload",
        "penstock-predicted-tokens-per-s": "2.5",
    }
    assert long == longer == {**streamed, "penstock-overflow": "too_long"}
    assert asked == streamed


async def test_a_full_or_missing_tier_sends_requests_over(checkpoint) -> None:
    engines = [FakeEngine(), FakeEngine()]
    engines[0].paused.set()
    async with running_gateway(
        checkpoint, engines=engines, plans=plans(checkpoint, waiting=1)
    ) as gateway:
        request = GenerationInput(model=SMALL, text="abc")
        held = [await gateway.handler.generate(request) for _ in range(2)]
        over = await gateway.handler.generate(request)
        assert [generation.tier.overflow for generation in [*held, over]] == ["", "", "busy"]
        assert over.model == SMALL
        assert len([piece async for piece in over.pieces]) > 0
        for generation in held:
            await generation.pieces.aclose()
        await gateway.replicas[0].kill()
        await until(lambda: gateway.handler.list_models()[0].ready_replicas == 0)
        missing = await gateway.handler.generate(request)
        assert (missing.tier.model, missing.tier.overflow) == (LARGE, "unavailable")
        await missing.pieces.aclose()
        await gateway.replicas[1].kill()
        await until(lambda: gateway.handler.list_models()[1].ready_replicas == 0)
        with pytest.raises(UnavailableError, match="'small'"):
            await gateway.handler.generate(request)
