"""The load generator's closed loop against a server that answers after a known time."""

import asyncio

import grpc
import grpc.aio
import pytest

from bench.load import Load, run, think_times
from router.proto import penstock_pb2 as pb

SERVICE_S = 0.02
PAUSE_S = 0.03


async def answer(request: pb.GenerateRequest, context):
    await asyncio.sleep(SERVICE_S)
    for _ in range(request.sampling.max_tokens):
        yield pb.GenerateResponse(token_ids=[1])


@pytest.fixture
async def target():
    server = grpc.aio.server()
    handler = grpc.unary_stream_rpc_method_handler(
        answer,
        request_deserializer=pb.GenerateRequest.FromString,
        response_serializer=pb.GenerateResponse.SerializeToString,
    )
    handlers = grpc.method_handlers_generic_handler("penstock.v1.Penstock", {"Generate": handler})
    server.add_generic_rpc_handlers((handlers,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


def load(target: str, **changes) -> Load:
    fields = {
        "model": "m",
        "concurrency": 1,
        "num_requests": 5,
        "prompt_tokens": 4,
        "max_tokens": 3,
        "vocab_size": 100,
        "seed": 7,
        "stagger_s": 0.0,
        "think_s": PAUSE_S,
    }
    return Load(target=target, **(fields | changes))


async def test_the_run_is_answers_and_the_pauses_between_them_and_nothing_else(target):
    what = load(target)
    result = await run(what)
    assert [request.num_tokens for request in result.requests] == [3] * 5
    pauses = think_times(what, 0)
    expected_s = sum(request.e2e_s for request in result.requests) + sum(
        next(pauses) for _ in range(4)
    )
    assert result.wall_s == pytest.approx(expected_s, abs=1e-6)


async def test_every_prompt_is_sent_once_whatever_the_number_of_clients(target):
    result = await run(load(target, concurrency=4, num_requests=9, think_s=0.0))
    assert len(result.requests) == 9
