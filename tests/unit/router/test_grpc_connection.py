"""The gRPC front against a bare HTTP/2 client: windows, cuts, floods, silence, leaving."""

import asyncio
import gzip
import struct
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
import h2.events
import pytest
from fake_engine import FakeEngine
from gateway_harness import MODEL, running_gateway, until
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from hypothesis import given
from hypothesis import strategies as st

from router.access.guard import OPEN
from router.grpc import call_framing as framing
from router.grpc import server
from router.grpc.call_gate import CallGate
from router.grpc.connection import GrpcConnection
from router.grpc.method_table import MethodTable
from router.grpc.peer_conduct import ConnectionLimits, PeerConduct
from router.proto import penstock_pb2 as pb
from router.running_requests import RunningRequest

GENERATE = b"/penstock.v1.Penstock/Generate"


def fields_of(event: Any) -> dict[str, str]:
    return dict(event.headers)


class BareClient:
    """An HTTP/2 client that does as it is told."""

    def __init__(self, reader, writer, settings=None):
        self._reader, self._writer = reader, writer
        self.h2 = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        self.h2.initiate_connection()
        if settings:
            self.h2.update_settings(settings)
        self.events = []
        self.flush()

    def flush(self):
        self._writer.write(self.h2.data_to_send())

    def begin(self, path=GENERATE, **extra):
        stream = self.h2.get_next_available_stream_id()
        headers = {
            ":method": "POST",
            ":scheme": "http",
            ":path": path.decode(),
            ":authority": "test",
            "content-type": "application/grpc",
            "te": "trailers",
        }
        headers |= {name.replace("_", "-"): value for name, value in extra.items()}
        self.h2.send_headers(stream, list(headers.items()))
        return stream

    def ask(self, request_id="", **sampling):
        stream = self.begin()
        message = pb.GenerateRequest(
            model=MODEL,
            text="ab",
            request_id=request_id,
            sampling=pb.SamplingOptions(**sampling),
        )
        self.h2.send_data(stream, framing.prefixed(message.SerializeToString()), end_stream=True)
        self.flush()
        return stream

    async def until(self, wanted, timeout_s=5.0):
        """The first event that `wanted` holds for, kept or to come; acknowledges data."""
        async with asyncio.timeout(timeout_s):
            while True:
                for event in self.events:
                    if wanted(event):
                        return event
                data = await self._reader.read(1 << 16)
                if not data:
                    return None
                self.events += self.h2.receive_data(data)
                self.flush()

    async def status(self, stream):
        """`grpc-status` of a call."""
        event = await self.until(
            lambda e: (
                getattr(e, "stream_id", None) == stream
                and isinstance(e, h2.events.TrailersReceived | h2.events.ResponseReceived)
                and "grpc-status" in fields_of(e)
            )
        )
        return int(fields_of(event)["grpc-status"])

    def messages(self, stream):
        data = b"".join(
            event.data
            for event in self.events
            if isinstance(event, h2.events.DataReceived) and event.stream_id == stream
        )
        reader = framing.MessageReader(1 << 24, b"")
        return [pb.GenerateResponse.FromString(message) for message in reader.feed(data)]


@asynccontextmanager
async def bare_client(gateway, settings=None):
    reader, writer = await asyncio.open_connection(*gateway.target.rsplit(":", 1))
    try:
        yield BareClient(reader, writer, settings)
    finally:
        writer.close()


def code(status):
    return status.value[0]


async def test_a_request_may_arrive_byte_by_byte(checkpoint):
    async with running_gateway(checkpoint) as gw, bare_client(gw) as client:
        stream = client.begin()
        message = pb.GenerateRequest(model=MODEL, text="ab", sampling={"max_tokens": 3})
        client.h2.send_data(stream, framing.prefixed(message.SerializeToString()), end_stream=True)
        for byte in client.h2.data_to_send():
            client._writer.write(bytes([byte]))
            await client._writer.drain()
        assert await client.status(stream) == 0
        assert "".join(piece.text for piece in client.messages(stream)) == "aba"


async def test_a_closed_window_holds_the_answer_back_and_an_open_one_lets_it_go(checkpoint):
    window = {SettingCodes.INITIAL_WINDOW_SIZE: 0}
    async with running_gateway(checkpoint) as gw, bare_client(gw, settings=window) as client:
        stream = client.ask(max_tokens=20)
        await until(lambda: len(gw.engine.requests) == 1 and gw.engine.num_running == 0)
        await client.until(lambda event: isinstance(event, h2.events.ResponseReceived))
        assert client.messages(stream) == []
        for _ in range(400):  # a few bytes at a time: messages are cut anywhere
            client.h2.increment_flow_control_window(7, stream)
        client.flush()
        assert await client.status(stream) == 0
        text = "".join(piece.text for piece in client.messages(stream))
        assert text == "ab" * 10


async def test_a_first_piece_leaves_at_once_and_later_ones_together(checkpoint, monkeypatch):
    writes = []
    flush = GrpcConnection._flush

    def counted(connection):
        if connection._unsent._parts:
            writes.append(len(connection._unsent._parts) // 2)
        flush(connection)

    monkeypatch.setattr(GrpcConnection, "_flush", counted)
    engine = FakeEngine(step_s=0.02)
    async with running_gateway(checkpoint, engines=[engine]) as gw, bare_client(gw) as client:
        engine.paused.set()
        calls = [client.ask(max_tokens=3) for _ in range(8)]
        await until(lambda: engine.num_running == 8)
        engine.paused.clear()
        assert [await client.status(call) for call in calls] == [0] * 8
    firsts = writes[:8]
    assert all(count <= 2 for count in firsts), "headers and one piece each"
    assert len(writes) <= 8 + 2 * 2, "later steps leave in one piece, or two"


async def test_the_status_leaves_with_the_last_piece_before_the_cleaning_up(
    checkpoint, monkeypatch
):
    happened = []
    flush, end = GrpcConnection._flush, RunningRequest.end

    def flushed(connection):
        if connection._unsent._parts:
            happened.append("sent")
        flush(connection)

    def ended(running):
        happened.append("ended")
        end(running)

    monkeypatch.setattr(GrpcConnection, "_flush", flushed)
    monkeypatch.setattr(RunningRequest, "end", ended)
    engine = FakeEngine(step_s=0.02)
    async with running_gateway(checkpoint, engines=[engine]) as gw, bare_client(gw) as client:
        stream = client.ask(max_tokens=2)
        assert await client.status(stream) == 0
        await until(lambda: "ended" in happened)
        assert happened[:3] == ["sent", "sent", "ended"]
        engine.step_s = 0.0
        for _ in range(20):  # whoever has its status may ask again under the same id
            stream = client.ask(request_id="again", max_tokens=2)
            assert await client.status(stream) == 0


async def test_calls_that_begin_wrong_are_refused_and_the_connection_lives(checkpoint):
    async with running_gateway(checkpoint) as gw, bare_client(gw) as client:
        empty = client.begin()
        client.h2.end_stream(empty)
        cut = client.begin()
        client.h2.send_data(cut, b"\0\0\0\0\x09abc", end_stream=True)
        late = client.begin(grpc_timeout="soon")
        packed = client.begin(grpc_encoding="zstd")
        lost = client.begin(path=b"/penstock.v1.Penstock/Nothing")
        page = client.begin(content_type="text/html")
        client.flush()
        internal = code(grpc.StatusCode.INTERNAL)
        assert [await client.status(stream) for stream in (empty, cut, late)] == [internal] * 3
        unknown = code(grpc.StatusCode.UNIMPLEMENTED)
        assert [await client.status(stream) for stream in (packed, lost)] == [unknown] * 2
        answer = await client.until(
            lambda e: isinstance(e, h2.events.ResponseReceived) and e.stream_id == page
        )
        assert fields_of(answer)[":status"] == "415"
        assert await client.status(client.ask(max_tokens=2)) == 0


async def test_two_messages_are_one_too_many(checkpoint):
    async with running_gateway(checkpoint) as gw, bare_client(gw) as client:
        stream = client.begin()
        client.h2.send_data(stream, framing.prefixed(b"") * 2)
        client.flush()
        assert await client.status(stream) == code(grpc.StatusCode.INTERNAL)


@pytest.mark.parametrize("hello", [b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", b"\x16\x03\x01" * 20])
async def test_another_protocol_is_hung_up_on(checkpoint, hello):
    async with running_gateway(checkpoint) as gw:
        reader, writer = await asyncio.open_connection(*gw.target.rsplit(":", 1))
        writer.write(hello)
        async with asyncio.timeout(5.0):
            while await reader.read(1 << 16):
                pass
        writer.close()


async def goodbye_of(client):
    return await client.until(lambda event: isinstance(event, h2.events.ConnectionTerminated))


async def test_a_flood_of_pings_ends_the_connection(checkpoint):
    async with running_gateway(checkpoint) as gw, bare_client(gw) as client:
        for _ in range(10):
            client.h2.ping(b"12345678")
        client.flush()
        assert (await goodbye_of(client)).error_code is ErrorCodes.ENHANCE_YOUR_CALM


async def test_a_flood_of_resets_ends_the_connection_and_its_calls(checkpoint):
    async with running_gateway(checkpoint) as gw, bare_client(gw) as client:
        client.ask(max_tokens=900)
        await until(lambda: gw.engine.num_running == 1)
        for _ in range(1200):
            client.h2.reset_stream(client.begin(), ErrorCodes.CANCEL)
        client.flush()
        assert (await goodbye_of(client)).error_code is ErrorCodes.ENHANCE_YOUR_CALM
        await until(lambda: gw.engine.num_running == 0 and len(gw.handler._running) == 0)


@pytest.mark.parametrize(
    "frame",
    [
        b"\0\0\0\x04\0\0\0\0\0",  # SETTINGS that set nothing
        b"\0\0\5\x02\0\0\0\0\x03\0\0\0\0\x0f",  # PRIORITY of a stream that is not there
        b"\0\0\0\0\0\0\0\0\1",  # DATA of nothing
    ],
    ids=["settings", "priorities", "empty data"],
)
async def test_a_flood_of_idle_frames_ends_the_connection_and_disturbs_nobody(checkpoint, frame):
    async with running_gateway(checkpoint) as gw, bare_client(gw) as client:
        client.begin()
        client.flush()
        async with bare_client(gw) as neighbour:
            client._writer.write(frame * 50_000)
            assert (await goodbye_of(client)).error_code is ErrorCodes.ENHANCE_YOUR_CALM
            assert await neighbour.status(neighbour.ask(max_tokens=2)) == 0


async def test_a_request_that_never_comes_ends_with_its_clock(checkpoint, monkeypatch):
    monkeypatch.setattr(ConnectionLimits, "__init__", _hurried(request_timeout_s=0.05))
    async with running_gateway(checkpoint) as gw, bare_client(gw) as client:
        silent, unfinished = client.begin(), client.begin()
        client.h2.send_data(unfinished, framing.prefixed(b""))
        whole = client.ask(max_tokens=2)
        late = code(grpc.StatusCode.DEADLINE_EXCEEDED)
        assert [await client.status(stream) for stream in (silent, unfinished)] == [late] * 2
        assert await client.status(whole) == 0


@pytest.mark.parametrize("hello", [b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"])
async def test_who_does_not_greet_in_time_is_hung_up_on(checkpoint, monkeypatch, hello):
    monkeypatch.setattr(ConnectionLimits, "__init__", _hurried(handshake_timeout_s=0.2))
    async with running_gateway(checkpoint) as gw, bare_client(gw) as greeted:
        reader, writer = await asyncio.open_connection(*gw.target.rsplit(":", 1))
        async with asyncio.timeout(5.0):
            for byte in hello:  # one that trickles is no better than one that is silent
                writer.write(bytes([byte]))
                await asyncio.sleep(0.02)
            with suppress(ConnectionError):
                while await reader.read(1 << 16):
                    pass
        writer.close()
        assert await greeted.status(greeted.ask(max_tokens=2)) == 0


def _hurried(**changes):
    made = ConnectionLimits.__init__
    return lambda self, **limits: made(self, **{**limits, **changes})


async def test_one_connection_too_many_is_told_to_go(checkpoint, monkeypatch):
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 1)
    async with running_gateway(checkpoint) as gw, bare_client(gw) as first:
        assert await first.status(first.ask(max_tokens=2)) == 0
        async with bare_client(gw) as second:
            assert (await goodbye_of(second)).error_code is ErrorCodes.ENHANCE_YOUR_CALM
        assert await first.status(first.ask(max_tokens=2)) == 0


async def test_who_leaves_says_so_and_finishes_what_runs(checkpoint):
    async with running_gateway(checkpoint) as gw, bare_client(gw) as client:
        stream = client.ask(max_tokens=100)
        await client.until(lambda event: isinstance(event, h2.events.DataReceived))
        stopping = asyncio.create_task(gw.front.stop(5.0))
        assert (await goodbye_of(client)).last_stream_id == stream
        async with asyncio.timeout(5.0):  # h2's client reads no more after a goodbye
            while await client._reader.read(1 << 16):
                pass
        await stopping
        assert gw.engine.aborts == []


async def test_a_silent_client_is_asked_and_then_closed():
    limits = ConnectionLimits(max_message_bytes=1000, keepalive_s=0.05, keepalive_timeout_s=0.05)
    gate = CallGate(MethodTable(), limits, OPEN)
    lost = asyncio.Event()

    class Lobby:
        def enter(self, connection):
            return True

        def leave(self, connection):
            lost.set()

    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: GrpcConnection(gate, limits, Lobby()), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    client = BareClient(reader, writer)
    await client.until(lambda event: isinstance(event, h2.events.PingReceived))
    assert not lost.is_set()
    async with asyncio.timeout(5.0):
        await lost.wait()  # the last ping was not answered: nobody read it
    writer.close()
    server.close()


def test_resets_are_forgiven_with_time_and_pings_with_answers():
    conduct = PeerConduct(ConnectionLimits(max_message_bytes=1, max_resets=3, resets_per_s=1), 0.0)
    assert [conduct.allows_reset(0.0) for _ in range(4)] == [True] * 3 + [False]
    assert conduct.allows_reset(10.0)
    assert [conduct.allows_ping(at_s) for at_s in (0, 11, 12, 13)] == [True] * 4
    conduct.note_answer()
    assert [conduct.allows_ping(at_s) for at_s in (14, 15, 16, 17)] == [True] * 3 + [False]


@given(st.lists(st.binary(max_size=50), max_size=5), st.booleans(), st.data())
def test_messages_survive_any_cut(messages, packed, data):
    def wire(message):
        body = gzip.compress(message) if packed else message
        return struct.pack(">BI", packed, len(body)) + body

    stream = b"".join(map(wire, messages))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    reader = framing.MessageReader(100, b"gzip")
    chunks = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert [message for chunk in chunks for message in reader.feed(chunk)] == messages
    assert not reader.is_within_message


@pytest.mark.parametrize(
    ("data", "encoding"),
    [
        (struct.pack(">BI", 0, 101), b""),
        (struct.pack(">BI", 1, 3) + b"abc", b"gzip"),
        (struct.pack(">BI", 1, 3) + b"abc", b""),
        (struct.pack(">BI", 1, 30) + gzip.compress(b"x" * 5000)[:30], b"gzip"),
        (struct.pack(">BI", 1, 15) + gzip.compress(b"abcdefgh" * 3)[:15], b"gzip"),
    ],
    ids=["too long", "no gzip", "unannounced", "a bomb", "cut off"],
)
def test_messages_that_are_none(data, encoding):
    with pytest.raises(framing.CallError):
        list(framing.MessageReader(100, encoding).feed(data))


def test_status_text_and_metadata_are_printable_on_the_wire():
    assert framing.status_headers(grpc.StatusCode.NOT_FOUND, "50 % é\n") == [
        (b"grpc-status", b"5"),
        (b"grpc-message", b"50 %25 %C3%A9%0A"),
    ]
    assert framing.metadata_headers((("a", "b"), ("c-bin", b"\0\xff"))) == [
        (b"a", b"b"),
        (b"c-bin", b"AP8"),
    ]
    assert framing.timeout_s(b"150m") == 0.15
