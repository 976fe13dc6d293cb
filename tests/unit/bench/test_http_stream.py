"""The load generator's reading of a streamed completion, cut anywhere."""

import asyncio
import json

import pytest

from bench.http_stream import stream_completion

USAGE = {"prompt_tokens": 3, "completion_tokens": 7}


def event(**fields):
    return f"data: {json.dumps(fields)}\n\n"


def chunked(body, size):
    data = body.encode()
    parts = [data[at : at + size] for at in range(0, len(data), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


async def answered(payload):
    """What `stream_completion` makes of a server that sends `payload` byte for byte."""
    bodies = []

    async def serve(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split()[0])
        bodies.append(json.loads(await reader.readexactly(length)))
        for at in range(0, len(payload), 11):
            writer.write(payload[at : at + 11])
            await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        return await stream_completion(f"127.0.0.1:{port}", {"prompt": [1, 2]}), bodies


@pytest.mark.parametrize("size", [5, 64, 4096])
async def test_tokens_come_from_the_usage_record(size):
    body = event(choices=[{"text": "a"}], usage=None) + event(choices=[{"text": "b"}])
    body += event(choices=[], usage=USAGE) + "data: [DONE]\n\n"
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    completion, bodies = await answered(head + chunked(body, size))
    assert completion.num_tokens == 7
    assert 0 < completion.first_s <= completion.ended_s
    assert bodies == [{"prompt": [1, 2]}]


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"HTTP/1.1 429 Busy\r\nContent-Length: 9\r\n\r\ntry later", "try later"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\ndata:", "closed"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            + chunked(event(error={"message": "lost"}), 4096),
            "lost",
        ),
    ],
)
async def test_a_refusal_or_a_break_is_an_error(payload, reason):
    with pytest.raises(RuntimeError, match=reason):
        await answered(payload)
