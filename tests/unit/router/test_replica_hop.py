"""The hop between gateway and leader: fan-out, cancel, loss, silence, epochs, bounds."""

import asyncio
import socket
import time

import pytest
from fake_engine import FakeEngine
from gateway_harness import fake_replica, until
from hops import hop_to, scripted_leader, submit

from cluster.base.errors import (
    InternalError,
    OverloadedError,
    UnavailableError,
    WorkerDiedError,
)
from replicas.api import FinishReason, GenerationRequest, SamplingParams
from router.hop_settings import HopSettings


def a_request(max_tokens=5, n=1, request_id="same-id", prompt=(1, 2, 3)) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(max_tokens=max_tokens, n=n),
    )


async def read_all(channel):
    deltas = []
    while batch := await channel.receive():
        deltas += batch
    return deltas


def tokens(deltas, index=0):
    return [t for delta in deltas if delta.index == index for t in delta.token_ids]


async def test_requests_with_one_id_from_two_gateways_do_not_mix():
    async with (
        fake_replica(FakeEngine()) as replica,
        hop_to(replica.record.endpoint, gateway_id="a") as first,
        hop_to(replica.record.endpoint, gateway_id="b") as second,
    ):
        await until(lambda: first.ready and second.ready)
        channels = [
            submit(first, a_request(6, prompt=(1, 2))),
            submit(second, a_request(6, prompt=(7, 8))),
            submit(first, a_request(6, prompt=(3, 4))),
        ]
        answers = await asyncio.gather(*(read_all(channel) for channel in channels))
        assert [tokens(answer) for answer in answers] == [
            [1, 2, 1, 2, 1, 2],
            [7, 8, 7, 8, 7, 8],
            [3, 4, 3, 4, 3, 4],
        ]
        assert first.num_in_flight == second.num_in_flight == 0
        assert replica.server.num_requests == 0


async def test_every_choice_ends_once_and_load_is_reported():
    async with fake_replica(FakeEngine()) as replica, hop_to(replica.record.endpoint) as stream:
        await until(lambda: stream.ready)
        deltas = await read_all(submit(stream, a_request(4, n=3)))
        ends = [d.index for d in deltas if d.finish_reason is not None]
        assert sorted(ends) == [0, 1, 2]
        assert stream.stats.step > 0


async def test_cancel_of_one_choice_leaves_the_others():
    async with fake_replica(FakeEngine()) as replica, hop_to(replica.record.endpoint) as stream:
        await until(lambda: stream.ready)
        channel = submit(stream, a_request(60, n=2))
        await channel.receive()
        channel.cancel_choice(0)
        rest = await read_all(channel)
        assert {d.index for d in rest if d.finish_reason is not None} == {1}
        await until(lambda: replica.server.num_requests == 0)
        assert [index for _, index in replica.engine.aborts] == [0]


async def test_cancelling_the_last_choice_cancels_the_request():
    async with fake_replica(FakeEngine()) as replica, hop_to(replica.record.endpoint) as stream:
        await until(lambda: stream.ready)
        channel = submit(stream, a_request(10_000, n=2))
        await channel.receive()
        channel.cancel_choice(1)
        channel.cancel_choice(0)
        assert channel.finished
        await until(lambda: replica.engine.num_running == 0)
        assert stream.num_in_flight == 0
        assert replica.server.num_requests == 0


async def test_loss_ends_every_request_within_milliseconds():
    async with fake_replica(FakeEngine()) as replica, hop_to(replica.record.endpoint) as stream:
        await until(lambda: stream.ready)
        channels = [submit(stream, a_request(10_000)) for _ in range(20)]
        for channel in channels:
            await channel.receive()
        started = time.monotonic()
        await replica.kill()
        results = await asyncio.gather(*map(read_all, channels), return_exceptions=True)
        elapsed_s = time.monotonic() - started
        assert [type(result) for result in results] == [UnavailableError] * 20
        assert elapsed_s < 0.5
        with pytest.raises(UnavailableError):
            submit(stream, a_request())


async def test_leader_failure_carries_its_cause_to_every_gateway():
    async with (
        fake_replica(FakeEngine()) as replica,
        hop_to(replica.record.endpoint) as first,
        hop_to(replica.record.endpoint) as second,
    ):
        await until(lambda: first.ready and second.ready)
        channels = [submit(first, a_request(10_000)), submit(second, a_request(10_000))]
        replica.server.fail_all(WorkerDiedError("rank 1 was killed", "wait"))
        for channel in channels:
            with pytest.raises(WorkerDiedError, match="rank 1 was killed"):
                await read_all(channel)
        await asyncio.sleep(0.1)
        assert not first.ready


async def test_another_epoch_is_refused():
    async with (
        fake_replica(FakeEngine()) as replica,
        hop_to(replica.record.endpoint, epoch="old") as stream,
    ):
        await until(lambda: "epoch" in stream.last_error)
        assert not stream.ready


async def test_reconnects_when_the_replica_is_back():
    async with fake_replica(FakeEngine()) as replica, hop_to(replica.record.endpoint) as stream:
        await until(lambda: stream.ready)
        for link in list(replica.server._links.values()):
            link.say_goodbye(UnavailableError("restarting"))
        await until(lambda: not stream.connected)
        await until(lambda: stream.ready)
        assert tokens(await read_all(submit(stream, a_request(2)))) == [1, 2]


async def test_gateway_disconnect_aborts_its_requests_only():
    async with fake_replica(FakeEngine()) as replica, hop_to(replica.record.endpoint) as stays:
        async with hop_to(replica.record.endpoint) as leaves:
            await until(lambda: stays.ready and leaves.ready)
            kept = submit(stays, a_request(10_000))
            submit(leaves, a_request(10_000))
            submit(leaves, a_request(10_000))
            await until(lambda: replica.engine.num_running == 3)
        await until(lambda: replica.engine.num_running == 1)
        assert len(replica.engine.aborts) == 2
        assert await kept.receive()


async def test_silent_replica_counts_as_lost():
    settings = HopSettings(silence_timeout_s=0.3, backoff_initial_s=5.0)
    async with (
        fake_replica(FakeEngine(), load_period_s=60.0) as replica,
        hop_to(replica.record.endpoint, settings=settings) as stream,
    ):
        await until(lambda: stream.ready)
        replica.engine.paused.set()
        channel = submit(stream, a_request(10))
        started = time.monotonic()
        with pytest.raises(UnavailableError, match="silent"):
            await read_all(channel)
        assert time.monotonic() - started < 1.0


async def test_idle_replica_keeps_reporting():
    settings = HopSettings(silence_timeout_s=0.5)
    async with (
        fake_replica(FakeEngine(), load_period_s=0.1) as replica,
        hop_to(replica.record.endpoint, settings=settings) as stream,
    ):
        await until(lambda: stream.ready)
        await asyncio.sleep(1.2)
        assert stream.ready
        assert len(replica.server._links) == 1


async def test_slow_reader_is_bounded_and_cancelled():
    async with fake_replica(FakeEngine()) as replica, hop_to(replica.record.endpoint) as stream:
        await until(lambda: stream.ready)
        channel = submit(stream, a_request(10_000), limit=50)
        other = submit(stream, a_request(100))
        reader = asyncio.create_task(read_all(other))
        await until(lambda: channel.finished)
        assert len(await channel.receive()) == 50
        with pytest.raises(OverloadedError, match="unread"):
            await channel.receive()
        assert len(tokens(await reader)) == 100
        await until(lambda: replica.engine.num_running == 0)


async def test_abort_gives_every_open_choice_an_end():
    async with fake_replica(FakeEngine()) as replica, hop_to(replica.record.endpoint) as stream:
        await until(lambda: stream.ready)
        channel = submit(stream, a_request(10_000, n=3))
        await channel.receive()
        assert channel.abort()
        assert not channel.abort()
        ends = [d for d in await read_all(channel) if d.finish_reason is not None]
        assert [(d.index, d.finish_reason) for d in ends] == [
            (index, FinishReason.ABORT) for index in range(3)
        ]
        await until(lambda: replica.engine.num_running == 0)


async def test_engine_refusal_reaches_the_request():
    engine = FakeEngine(refuse=WorkerDiedError("rank 1 is gone"))
    async with fake_replica(engine) as replica, hop_to(replica.record.endpoint) as stream:
        await until(lambda: stream.ready)
        with pytest.raises(WorkerDiedError, match="rank 1"):
            await read_all(submit(stream, a_request()))
        assert replica.server.num_requests == 0
        assert not stream.ready


async def test_engine_fault_ends_one_request_without_its_text():
    class Faulty(FakeEngine):
        def add_request(self, request):
            if request.prompt_token_ids == (9,):
                raise ZeroDivisionError("secret detail")
            super().add_request(request)

    async with fake_replica(Faulty()) as replica, hop_to(replica.record.endpoint) as stream:
        await until(lambda: stream.ready)
        good = submit(stream, a_request(5))
        (bad,) = await read_all(submit(stream, a_request(prompt=(9,))))
        assert bad.error["code"] == InternalError.code
        assert "secret" not in str(bad.error)
        assert tokens(await read_all(good)) == [1, 2, 3, 1, 2]


async def test_drain_refuses_new_requests_and_waits_for_the_old():
    async with fake_replica(FakeEngine()) as replica, hop_to(replica.record.endpoint) as stream:
        await until(lambda: stream.ready)
        channel = submit(stream, a_request(100))
        await channel.receive()
        draining = asyncio.create_task(replica.server.drain(5.0))
        await until(lambda: stream.draining)
        with pytest.raises(UnavailableError):
            submit(stream, a_request())
        assert len(tokens(await read_all(channel))) > 50
        assert await draining


async def test_drain_gives_up_at_its_timeout():
    async with fake_replica(FakeEngine()) as replica, hop_to(replica.record.endpoint) as stream:
        await until(lambda: stream.ready)
        submit(stream, a_request(100_000))
        await until(lambda: replica.server.num_requests == 1)
        assert not await replica.server.drain(0.05)


async def test_retired_stream_finishes_what_runs_then_ends():
    async with fake_replica(FakeEngine()) as replica, hop_to(replica.record.endpoint) as stream:
        await until(lambda: stream.ready)
        channel = submit(stream, a_request(50))
        stream.retire()
        assert not stream.ready
        assert len(tokens(await read_all(channel))) == 50
        await until(lambda: stream.ended)
        assert not stream.reinstate()


async def test_a_replica_that_never_answers_counts_as_silent():
    settings = HopSettings(silence_timeout_s=0.2, backoff_initial_s=5.0)
    async with scripted_leader() as endpoint, hop_to(endpoint, settings=settings) as stream:
        await until(lambda: "silent" in stream.last_error)
        assert not stream.ready


async def test_a_leader_that_talks_nonsense_ends_the_stream_with_an_internal_error():
    said = (5).to_bytes(4, "little") + b"hello"
    settings = HopSettings(backoff_initial_s=5.0)
    async with scripted_leader(said) as endpoint, hop_to(endpoint, settings=settings) as stream:
        await until(lambda: "malformed" in stream.last_error)
        assert not stream.ready


async def test_a_port_where_nobody_listens_is_tried_again():
    probe = socket.create_server(("127.0.0.1", 0))
    endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    probe.close()
    async with hop_to(endpoint) as stream:
        await until(lambda: "cannot be reached" in stream.last_error)
        assert not stream.ready
        assert not stream.ended
