"""Raw sockets against the server: disconnects, slow clients, bad bytes, caps."""

import asyncio
import contextlib
import json
import socket
import time

import pytest
from scripted_handler import FLOOD_BYTES, MODEL, SCRIPT, until

from cluster.base.errors import ConfigError
from router.listen import listening_socket


def post(body, path="/v1/completions", extra=()):
    content = json.dumps(body).encode()
    head = [
        f"POST {path} HTTP/1.1",
        "Host: front",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
        *extra,
    ]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + content


ASK_S = 8.0
COMPLETION = {"model": MODEL, "prompt": "x"}
GET = b"GET /healthz HTTP/1.1\r\nHost: front\r\n\r\n"


async def connect(server):
    return await asyncio.open_connection("127.0.0.1", server.port)


async def ask(server, data):
    """Send bytes, return all that comes until the answer is complete or the server closes."""
    async with asyncio.timeout(ASK_S):
        return await exchange(server, data)


async def exchange(server, data):
    reader, writer = await connect(server)
    answer = b""
    try:
        with contextlib.suppress(ConnectionError):
            writer.write(data)
            await writer.drain()
        with contextlib.suppress(ConnectionError):
            while part := await reader.read(65536):
                answer += part
                if answer.count(b"HTTP/1.1 ") and answer.endswith(
                    (b"}", b"[DONE]\n\n\r\n0\r\n\r\n")
                ):
                    break
    finally:
        writer.close()
    return answer


def status_of(answer):
    return int(answer.split(b" ", 2)[1])


@pytest.mark.parametrize("stream", [True, False])
async def test_leaving_client_closes_the_generation_at_once(serve, handler, stream, caplog):
    handler.endless = True
    async with serve() as server:
        reader, writer = await connect(server)
        writer.write(post(COMPLETION | {"stream": stream}))
        if stream:
            await reader.readuntil(b"more ")
        else:
            await until(lambda: handler.opened == 1)
        left = time.monotonic()
        writer.transport.abort()
        await until(lambda: handler.closed == 1)
        assert time.monotonic() - left < 0.5
        await asyncio.sleep(0.05)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_leaving_before_the_first_piece_closes_too(serve, handler):
    handler.delay_s = 60.0
    async with serve() as server:
        _, writer = await connect(server)
        writer.write(post(COMPLETION | {"stream": True, "prompt": ["a", "b"]}))
        await until(lambda: handler.opened == 2)
        writer.close()
        await until(lambda: handler.closed == 2)


async def test_twenty_leavers_do_not_harm_a_reader(serve, handler):
    handler.delay_s = 0.02
    async with serve() as server:
        leavers = [await connect(server) for _ in range(20)]
        for at, (_, writer) in enumerate(leavers):
            writer.write(post(COMPLETION | {"stream": at % 2 == 0}))
        reading = asyncio.create_task(ask(server, post(COMPLETION)))
        await until(lambda: handler.opened >= 20)
        for _, writer in leavers:
            writer.transport.abort()
        answer = await reading
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["text"] == "".join(SCRIPT)
        await until(lambda: handler.closed == 21)


async def test_client_that_never_reads_stops_the_generation(serve, handler):
    """The front pulls no further: pieces wait in the engine's bounded buffer, not in memory."""
    handler.flood = True
    async with serve() as server:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        await asyncio.get_running_loop().run_in_executor(
            None, sock.connect, ("127.0.0.1", server.port)
        )
        sock.sendall(post(COMPLETION | {"stream": True}))
        seen = -1
        while handler.flooded != seen or seen == 0:
            seen = handler.flooded
            await asyncio.sleep(0.2)
        assert seen * FLOOD_BYTES < 16 << 20
        assert handler.closed == 0
        sock.close()
        await until(lambda: handler.closed == 1)


async def test_stream_framing(serve):
    async with serve() as server:
        answer = await ask(server, post(COMPLETION | {"stream": True}, extra=["Connection: close"]))
    head, _, _ = answer.partition(b"\r\n\r\n")
    assert b"text/event-stream" in head
    assert b"data: [DONE]\n\n" in answer
    assert answer.count(b'"text":') == len(SCRIPT) + 1
    assert "\u2028".encode() not in answer


async def test_stream_error_ends_without_done(serve, handler):
    handler.fail_after, handler.fail_with = 1, ConfigError("broken")
    async with serve() as server:
        answer = await ask(server, post(COMPLETION | {"stream": True}, extra=["Connection: close"]))
    assert b'data: {"error":' in answer
    assert b"[DONE]" not in answer


async def test_each_piece_is_sent_when_it_exists(serve, handler):
    handler.delay_s = 0.1
    async with serve() as server:
        reader, writer = await connect(server)
        writer.write(post(COMPLETION | {"stream": True}))
        await reader.readuntil(b'"Hello"')
        first = time.monotonic()
        await reader.readuntil(b"[DONE]")
        assert time.monotonic() - first > 0.1 * (len(SCRIPT) - 2)
        writer.close()


async def test_pipelined_requests_are_all_answered_in_order(serve):
    async with serve() as server:
        reader, writer = await connect(server)
        writer.write(GET * 4 + post(COMPLETION | {"max_tokens": 1}))
        for _ in range(4):
            await reader.readuntil(b'{"status":"ok"}')
        await reader.readuntil(b'"text":"Hello"')
        writer.close()


async def test_a_bad_request_does_not_end_the_connection(serve):
    async with serve() as server:
        reader, writer = await connect(server)
        writer.write(post({"model": MODEL, "prompt": 5}))
        assert b" 400 " in await reader.readuntil(b"\r\n")
        await reader.readuntil(b"}}")
        writer.write(GET)
        assert b" 200 " in await reader.readuntil(b"\r\n")
        writer.close()


async def test_expect_continue(serve):
    async with serve() as server:
        reader, writer = await connect(server)
        head, _, body = post(COMPLETION, extra=["Expect: 100-continue"]).partition(b"\r\n\r\n")
        writer.write(head + b"\r\n\r\n")
        assert b"100 Continue" in await reader.readuntil(b"\r\n\r\n")
        writer.write(body)
        assert b" 200 " in await reader.readuntil(b"\r\n")
        writer.close()


CHUNKED = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
BAD_BYTES = {
    "words": (b"hello there\r\n\r\n", {400}),
    "TLS hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64), {400}),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400, 505}),
    "HTTP/9.9": (b"GET / HTTP/9.9\r\nHost: a\r\n\r\n", {400, 505}),
    "long method": (b"X" * 300 + b" / HTTP/1.1\r\nHost: a\r\n\r\n", {400, 501}),
    "no host": (b"GET /healthz HTTP/1.1\r\n\r\n", {400}),
    "two hosts": (b"GET /healthz HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", {400}),
    "NUL in a header": (b"GET /healthz HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n", {400}),
    "no colon": (b"GET /healthz HTTP/1.1\r\nHost: a\r\nbroken\r\n\r\n", {400}),
    "5,000 headers": (
        b"GET /healthz HTTP/1.1\r\nHost: a\r\n" + b"x: y\r\n" * 5000 + b"\r\n",
        {431},
    ),
    "200 KB header": (
        b"GET /healthz HTTP/1.1\r\nHost: a\r\nx: " + b"y" * 200_000 + b"\r\n\r\n",
        {431},
    ),
    "100 KB URL": (b"GET /" + b"u" * 100_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", {414, 431}),
    "length -1": (CHUNKED + b"Content-Length: -1\r\n\r\n{}", {400}),
    "length word": (CHUNKED + b"Content-Length: ten\r\n\r\n{}", {400}),
    "length 10^30": (CHUNKED + b"Content-Length: 1" + b"0" * 30 + b"\r\n\r\n{}", {400, 413}),
    "two lengths": (CHUNKED + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", {400}),
    "length and chunks": (
        CHUNKED + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        {400},
    ),
    "chunk size zz": (CHUNKED + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", {400}),
    "chunk size 2^64": (
        CHUNKED + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 17 + b"\r\n",
        {400},
    ),
    "unknown encoding": (CHUNKED + b"Transfer-Encoding: rot13\r\n\r\n{}", {400, 501}),
    "websocket upgrade": (
        b"GET /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n",
        {400, 405, 426},
    ),
}


async def test_bytes_that_are_no_request(serve):
    async with serve(head_timeout_s=2.0, body_timeout_s=2.0) as server:
        for name, (data, statuses) in BAD_BYTES.items():
            answer = await ask(server, data)
            assert status_of(answer) in statuses, (name, answer[:200])
            assert b'{"error":' in answer, name
        assert status_of(await ask(server, GET)) == 200


async def test_a_head_that_never_ends_is_cut(serve):
    async with serve() as server:
        start = b"GET /healthz HTTP/1.1\r\nHost: a\r\nx: "
        answer = await ask(server, start + b"y" * (8 << 20))
        assert answer == b"" or status_of(answer) == 431


@pytest.mark.parametrize(
    "first", [b"", b"GET /healthz HT", b"GET /healthz HTTP/1.1\r\nHost: a\r\n"]
)
async def test_slow_heads_are_closed(serve, first):
    async with serve(head_timeout_s=0.3) as server:
        start = time.monotonic()
        answer = await ask(server, first)
        assert status_of(answer) == 408
        assert 0.2 < time.monotonic() - start < 2


async def test_slow_and_short_bodies_are_closed(serve, handler):
    async with serve(body_timeout_s=0.3) as server:
        start = time.monotonic()
        answer = await ask(server, post(COMPLETION)[:-5])
        assert status_of(answer) == 408
        assert b"connection: close" in answer
        assert 0.2 < time.monotonic() - start < 2
        assert handler.opened == 0


async def test_a_slow_body_does_not_count_against_a_running_answer(serve, handler):
    handler.delay_s = 0.15
    async with serve(head_timeout_s=0.2, body_timeout_s=0.2) as server:
        answer = await ask(server, post(COMPLETION))
        assert status_of(answer) == 200


@pytest.mark.parametrize("chunked", [True, False])
async def test_large_bodies_are_413(serve, chunked):
    async with serve(max_body_bytes=100_000) as server:
        body = b'{"prompt": "' + b"x" * 1_000_000 + b'"}'
        if chunked:
            data = CHUNKED + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (
                len(body),
                body,
            )
        else:
            data = CHUNKED + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        answer = await ask(server, data)
        assert status_of(answer) == 413
        assert b"connection: close" in answer


async def test_chunk_floods_are_cut_without_a_stall(serve):
    flood = CHUNKED + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 200_000
    async with serve() as server:
        flooding = asyncio.create_task(ask(server, flood))
        worst = 0.0
        while not flooding.done():
            start = time.monotonic()
            await asyncio.sleep(0.001)
            worst = max(worst, time.monotonic() - start)
        answer = await flooding
        assert answer == b"" or status_of(answer) == 400
        assert worst < 0.5


async def test_connections_over_the_cap_are_refused(serve):
    async with serve(max_connections=3) as server:
        held = [await connect(server) for _ in range(3)]
        await asyncio.sleep(0.05)
        answer = await ask(server, GET)
        assert status_of(answer) == 503
        assert b"retry-after" in answer
        for _, writer in held:
            writer.close()
        await asyncio.sleep(0.05)
        assert status_of(await ask(server, GET)) == 200


async def test_stop_lets_running_answers_finish(serve, handler):
    handler.delay_s = 0.05
    async with serve(drain_s=5.0) as server:
        answering = asyncio.create_task(ask(server, post(COMPLETION)))
        await until(lambda: handler.opened == 1)
        await server.stop()
        assert b'"finish_reason":"stop"' in await answering
        with pytest.raises(OSError, match=r"[Cc]onnect"):
            await connect(server)


async def test_stop_ends_what_does_not_finish(serve, handler):
    handler.endless = True
    async with serve(drain_s=1.0) as server:
        _, writer = await connect(server)
        writer.write(post(COMPLETION | {"stream": True}))
        await until(lambda: handler.opened == 1)
        start = time.monotonic()
        await server.stop()
        assert time.monotonic() - start < 4
        await until(lambda: handler.closed == 1)
        writer.close()


def test_two_servers_share_a_port_and_a_taken_one_is_named():
    first = listening_socket("127.0.0.1", 0, "gateway.http_port")
    port = first.getsockname()[1]
    second = listening_socket("127.0.0.1", port, "gateway.http_port")
    second.close()
    first.close()
    with pytest.raises(ConfigError, match="cannot listen"):
        listening_socket("203.0.113.1", port, "gateway.http_port")
