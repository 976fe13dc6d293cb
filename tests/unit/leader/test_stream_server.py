"""The leader's end against a plain socket: versions, nonsense, gateways that go or stall."""

import asyncio
import dataclasses
from contextlib import asynccontextmanager

import pytest

from cluster.base.errors import InternalError, UnavailableError, WorkerDiedError
from replicas.api import FinishReason, GenerationDelta, GenerationRequest, ReplicaStats
from replicas.leader import stream_codec as codec
from replicas.leader import stream_server
from replicas.leader.stream_server import ReplicaStreamServer

HELLO = codec.Hello(codec.HOP_VERSION, "gw", "e1")
REQUEST = GenerationRequest(request_id="r", prompt_token_ids=(1, 2, 3))


class Inbox:
    def __init__(self):
        self.requests = []
        self.aborts = []

    def add_request(self, request):
        self.requests.append(request)

    def abort(self, request_id, index=None):
        self.aborts.append((request_id, index))


class PlainGateway:
    def __init__(self, reader, writer):
        self._reader, self._writer = reader, writer
        self._frames = codec.FrameReader()
        self._messages = []

    def say(self, *messages):
        self._writer.write(b"".join(map(codec.frame, messages)))

    def say_bytes(self, data):
        self._writer.write(data)

    async def hear(self):
        """The next message; None at the end of the stream."""
        while not self._messages:
            data = await asyncio.wait_for(self._reader.read(1 << 16), 5.0)
            if not data:
                return None
            self._messages += map(codec.decode_from_replica, self._frames.feed(data))
        return self._messages.pop(0)

    def close(self):
        self._writer.close()


@asynccontextmanager
async def serving(load_period_s=60.0):
    inbox = Inbox()
    server = ReplicaStreamServer(inbox, epoch="e1", load_period_s=load_period_s)
    port = await server.start("127.0.0.1")
    gateways = []

    async def connect(*messages):
        gateways.append(PlainGateway(*await asyncio.open_connection("127.0.0.1", port)))
        gateways[-1].say(*messages)
        return gateways[-1]

    try:
        yield server, inbox, connect
    finally:
        for gateway in gateways:
            gateway.close()
        await server.stop()


async def until(condition):
    async with asyncio.timeout(5.0):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


def a_token(engine_id, token_id=7, **fields):
    return GenerationDelta(request_id=engine_id, token_ids=(token_id,), **fields)


async def test_first_words_go_ahead_of_what_running_streams_have_to_say():
    def step(*keys):
        return [GenerationDelta(request_id=f"1-{key}-r", token_ids=(key,)) for key in keys]

    async with serving() as (server, inbox, connect):
        gateway = await connect(HELLO, *(codec.Submit(key, REQUEST) for key in (1, 2, 3, 4)))
        await gateway.hear()  # the greeting
        await until(lambda: len(inbox.requests) == 4)
        for said, heard in (((1, 2), [1, 2]), ((1, 2, 3, 4), [3, 4, 1, 2]), ((2, 3), [2, 3])):
            server.publish(step(*said), ReplicaStats())
            assert [delta.stream_key for delta in (await gateway.hear()).deltas] == heard


async def test_another_version_is_told_so():
    async with serving() as (_, _, connect):
        gateway = await connect(codec.Hello(codec.HOP_VERSION + 1, "gw", "e1"))
        goodbye = await gateway.hear()
        assert goodbye.error["code"] == UnavailableError.code
        assert "version" in goodbye.error["cause"]
        assert await gateway.hear() is None


@pytest.mark.parametrize(
    "data",
    [
        codec.frame(codec.Submit(1, REQUEST)),
        codec.frame(HELLO) + (4).to_bytes(4, "little") + b"junk",
        codec.frame(HELLO) + (1 << 31).to_bytes(4, "little"),
    ],
    ids=["no hello", "no message", "too long"],
)
async def test_bytes_that_mean_nothing_end_their_own_stream_with_a_reason(data):
    async with serving() as (server, inbox, connect):
        good = await connect(HELLO)
        bad = await connect()
        bad.say_bytes(data)
        while isinstance(message := await bad.hear(), codec.Step):
            pass
        assert message.error["code"] == InternalError.code
        assert await bad.hear() is None
        good.say(codec.Submit(1, REQUEST))
        await until(lambda: inbox.requests)
        assert server.num_requests == 1


async def test_a_gateway_that_does_not_read_is_sent_the_rest_later_in_order():
    async with serving() as (server, inbox, connect):
        gateway = await connect(HELLO, codec.Submit(5, REQUEST))
        await until(lambda: inbox.requests)
        engine_id = inbox.requests[0].request_id
        large = tuple(float(value) for value in range(2000))
        num_steps = 1500
        for step in range(num_steps):  # 27 MB: more than any socket buffers
            delta = a_token(engine_id, step, embedding=large)
            server.publish([delta], ReplicaStats(step=step))
        last = a_token(engine_id, num_steps, finish_reason=FinishReason.LENGTH)
        server.publish([last], ReplicaStats(step=num_steps))
        tokens, num_messages = [], 0
        while len(tokens) <= num_steps:
            message = await gateway.hear()
            num_messages += 1
            tokens += [token for delta in message.deltas for token in delta.whole.token_ids]
        assert tokens == list(range(num_steps + 1))
        assert num_messages < num_steps / 4
        assert server.num_requests == 0


async def test_a_gateway_that_goes_leaves_nothing_running():
    async with serving() as (server, inbox, connect):
        gateway = await connect(HELLO, codec.Submit(1, REQUEST), codec.Submit(2, REQUEST))
        await until(lambda: len(inbox.requests) == 2)
        gateway.close()
        await until(lambda: len(inbox.aborts) == 2)
        assert server.num_requests == 0
        server.publish([a_token(inbox.requests[0].request_id)], ReplicaStats())


async def test_a_silent_gateway_counts_as_gone(monkeypatch):
    monkeypatch.setattr(stream_server, "GATEWAY_SILENCE_S", 0.1)
    async with serving() as (server, inbox, connect):
        gateway = await connect(HELLO, codec.Submit(1, REQUEST))
        for _ in range(4):
            await asyncio.sleep(0.05)
            gateway.say(codec.Beat())
        assert server.num_requests == 1
        await until(lambda: inbox.aborts)
        assert await gateway.hear() is not None
        assert await gateway.hear() is None


async def test_a_late_gateway_hears_why_the_replica_has_failed():
    async with serving() as (server, _, connect):
        server.fail_all(WorkerDiedError("rank 1 was killed"))
        gateway = await connect(HELLO)
        assert (await gateway.hear()).error["code"] == WorkerDiedError.code


async def test_tokens_come_before_the_goodbye():
    async with serving() as (server, inbox, connect):
        gateway = await connect(HELLO, codec.Submit(1, dataclasses.replace(REQUEST)))
        await until(lambda: inbox.requests)
        server.publish([a_token(inbox.requests[0].request_id)], ReplicaStats(step=1))
        server.fail_all(WorkerDiedError("rank 1 was killed"))
        assert (await gateway.hear()).load.step == 0
        assert [delta.token_ids for delta in (await gateway.hear()).deltas] == [(7,)]
        assert isinstance(await gateway.hear(), codec.Goodbye)
        assert await gateway.hear() is None
