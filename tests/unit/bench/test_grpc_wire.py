"""The load generator's own gRPC client against the library's server."""

import asyncio

import grpc
import grpc.aio
import pytest

from bench.grpc_wire import StreamingClient

METHOD = "/test.Echo/Stream"


async def stream(request: bytes, context):
    """As many messages as the request's first byte says, each the rest of it."""
    for _ in range(request[0]):
        yield request[1:]


async def started() -> tuple[grpc.aio.Server, str]:
    server = grpc.aio.server()
    handler = grpc.unary_stream_rpc_method_handler(stream)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("test.Echo", {"Stream": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"127.0.0.1:{port}"


async def test_every_message_of_many_calls_arrives_in_order():
    server, target = await started()
    client = await StreamingClient.connect(target)
    # Together far more than the server's first window, and answers longer than one frame.
    bodies = [bytes([index]) * size for index, size in enumerate((0, 1, 70, 20_000) * 10)]
    answers = await asyncio.gather(*(client.call(METHOD, b"\x03" + body) for body in bodies))
    for body, (arrivals, ended_s) in zip(bodies, answers, strict=True):
        assert [message for _, message in arrivals] == [body] * 3
        times_s = [*(at for at, _ in arrivals), ended_s]
        assert times_s == sorted(times_s)
    client.close()
    await server.stop(None)


async def test_a_refused_call_ends_without_messages():
    server, target = await started()
    client = await StreamingClient.connect(target)
    arrivals, _ = await client.call("/test.Echo/Nothing", b"\x01a")
    assert arrivals == []
    client.close()
    await server.stop(None)


async def test_a_server_that_goes_fails_its_calls():
    waiting = asyncio.Event()

    async def hang_up(reader, writer):
        await waiting.wait()
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    client = await StreamingClient.connect(f"{host}:{port}")
    call = asyncio.create_task(client.call(METHOD, b"\x01a"))
    await asyncio.sleep(0)
    waiting.set()
    with pytest.raises(ConnectionError):
        await call
    server.close()
