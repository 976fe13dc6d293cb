"""A gateway that follows another plan, and replicas that leave, while requests run."""

import asyncio
from dataclasses import replace

import pytest
from fake_engine import FakeEngine
from gateway_harness import (
    LIMITS,
    MODEL,
    fake_replica,
    model_plan,
    running_gateway,
    until,
    write_checkpoint,
)
from hops import hop_to, submit

from cluster.base.errors import OverloadedError, UnavailableError, UnknownModelError
from replicas.api import GenerationRequest, SamplingParams
from replicas.leader.departure import Departure
from router.api import GenerationInput
from router.gateway_metrics import GatewayMetrics
from router.served_model import serve_models


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("live") / "ckpt")


def an_input(model: str, max_tokens: int = 8) -> GenerationInput:
    return GenerationInput(model=model, text="abc", sampling={"max_tokens": max_tokens})


async def num_tokens(generation) -> int:
    return sum([len(piece.token_ids) async for piece in generation.pieces])


async def test_a_model_that_goes_is_unknown_at_once_and_its_requests_finish(checkpoint):
    first, second = model_plan(checkpoint), model_plan(checkpoint, name="second")
    engines = [FakeEngine(), FakeEngine()]
    async with running_gateway(checkpoint, engines=engines, plans=(first, second)) as gateway:
        handler = gateway.handler
        metrics = GatewayMetrics(handler.list_models)
        running = await handler.generate(an_input("second", 200))
        handler.serve(serve_models([replace(first, replicas=3)], {}), LIMITS)
        metrics.follow_models()
        with pytest.raises(UnknownModelError):
            await handler.generate(an_input("second"))
        assert [(info.name, info.replicas) for info in handler.list_models()] == [(MODEL, 3)]
        assert metrics.known == {MODEL}
        assert await num_tokens(running) == 200


async def test_limits_that_shrink_refuse_new_requests_and_spare_old_ones(checkpoint):
    async with running_gateway(checkpoint) as gateway:
        handler = gateway.handler
        running = await handler.generate(an_input(MODEL, 200))
        models = serve_models([model_plan(checkpoint)])
        handler.serve(models, replace(LIMITS, max_active_requests=1))
        with pytest.raises(OverloadedError):
            await handler.generate(an_input(MODEL))
        assert await num_tokens(running) == 200
        assert await num_tokens(await handler.generate(an_input(MODEL))) == 8


def test_what_was_read_of_a_checkpoint_is_not_read_again(checkpoint):
    plan = model_plan(checkpoint)
    known = serve_models([plan])
    follow = serve_models([replace(plan, replicas=2), replace(plan, name="other")], known)
    assert follow[MODEL].tokenizer is known[MODEL].tokenizer
    assert follow[MODEL].plan.replicas == 2
    assert follow["other"].tokenizer is not known[MODEL].tokenizer


async def test_a_request_under_way_when_a_drain_begins_is_served():
    request = GenerationRequest(
        request_id="r", prompt_token_ids=(1, 2), params=SamplingParams(max_tokens=5)
    )
    async with fake_replica(FakeEngine()) as replica, hop_to(replica.record.endpoint) as stream:
        await until(lambda: stream.ready)
        draining = asyncio.create_task(replica.server.drain(10.0))
        await asyncio.sleep(0)  # announced, and not yet heard here
        assert stream.ready
        channel = submit(stream, request)
        await until(lambda: stream.draining)
        with pytest.raises(UnavailableError):
            submit(stream, request)
        tokens, reason = [], None
        while reason is None:
            for delta in await channel.receive():
                tokens += delta.token_ids
                reason = delta.finish_reason
                assert delta.error is None
        assert len(tokens) == 5
        assert await draining


async def test_a_departure_waits_for_stragglers_and_not_for_ever():
    busy = [True]
    leaving = Departure(lambda: not busy, settle_s=0.02)
    leaving.is_announced = True
    assert not await leaving.wait(0.1)
    assert leaving.is_closed
    leaving = Departure(lambda: not busy, settle_s=0.02)
    leaving.is_announced = True
    waiting = asyncio.create_task(leaving.wait(5.0))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    busy.clear()
    leaving.note_idle()
    assert await waiting


async def test_a_killed_replica_is_not_shown_as_ready_until_its_record_expires(checkpoint):
    async with running_gateway(checkpoint, engines=[FakeEngine(), FakeEngine()]) as gateway:
        await until(lambda: all(member.ready for member in gateway.directory.members()))
        await gateway.replicas[0].kill()
        await until(lambda: not gateway.directory.members()[0].ready)
        killed, other = (await gateway.handler.status())["replicas"]
    assert killed["state"] == "unreachable"
    assert killed["detail"]
    assert other["state"] == "ready"
    assert not other["detail"]
