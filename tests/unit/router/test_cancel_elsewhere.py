"""Cancel by id where several gateways share a port: any of them may be asked."""

import asyncio

from gateway_harness import MODEL, running_gateway, until
from hops import hop_to, scripted_leader

from cluster.base.errors import UnavailableError
from replicas.api import FinishReason
from replicas.leader import stream_codec as codec
from router.client import AsyncPenstockClient, RequestOptions
from router.hop_settings import HopSettings


async def test_another_gateway_ends_a_request_by_its_id(checkpoint):
    async with (
        running_gateway(checkpoint) as first,
        running_gateway(checkpoint, engines=[]) as second,
        AsyncPenstockClient(first.target) as mine,
        AsyncPenstockClient(second.target) as other,
    ):
        await second.membership.publish(first.replicas[0].record)
        await until(second.handler.ready)
        options = RequestOptions(request_id="mine-1")
        stream = mine.generate(MODEL, "ab", options=options, max_tokens=900, n=2)
        bystander = mine.generate(MODEL, "ab", max_tokens=60)
        await anext(stream)
        assert not await other.cancel("mine-2")
        assert not await other.cancel("no id \n at all")
        assert await other.cancel("mine-1")
        answers = await stream.result()
        assert {answer.finish_reason for answer in answers} == {FinishReason.ABORT}
        assert (await bystander.result())[0].finish_reason is FinishReason.LENGTH
        await until(lambda: first.engine.num_running == 0)
        assert first.replicas[0].server.num_requests == 0
        assert not await other.cancel("mine-1")


async def test_a_replica_that_does_not_answer_has_no_such_request():
    step = codec.frame(codec.Step((), codec.ReplicaStats(), draining=False))
    settings = HopSettings(answer_timeout_s=0.05)
    async with scripted_leader(step) as endpoint, hop_to(endpoint, settings=settings) as stream:
        assert not await stream.cancel_named("mine-1")
        await until(lambda: stream.connected)
        assert not await stream.cancel_named("mine-1")


async def test_a_lost_replica_answers_no_at_once():
    step = codec.frame(codec.Step((), codec.ReplicaStats(), draining=False))
    settings = HopSettings(answer_timeout_s=60.0)
    async with scripted_leader(step) as endpoint, hop_to(endpoint, settings=settings) as stream:
        await until(lambda: stream.connected)
        asked = asyncio.create_task(stream.cancel_named("mine-1"))
        await asyncio.sleep(0.01)
        assert not asked.done()
        await stream.close(UnavailableError("closing"))
        assert not await asyncio.wait_for(asked, 5.0)
