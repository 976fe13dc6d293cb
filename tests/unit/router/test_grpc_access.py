"""Keys and TLS at the gRPC front, met by grpcio's client, ours, and sockets that mean no good."""

import asyncio
import ssl
import time

import grpc
import pytest
import uvloop
from gateway_harness import MODEL, running_gateway
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cluster.base.errors import ConfigError, UnauthenticatedError, UnavailableError
from router.access.tls import GatewayTls
from router.access.tls_listener import TlsListener
from router.client import AsyncPenstockClient, PenstockClient, tls_credentials
from router.listen import listening_socket
from tests.support.certificates import Authority, tls_plan

PROMPT = "ab"


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def server(authority):
    return authority.issue("gateway")


@pytest.fixture
def keys_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text("ann: sk-ann\nsk-other\n")
    return str(file)


async def generated(client):
    [answer] = await client.generate(MODEL, PROMPT, max_tokens=3, deadline_s=10).result()
    return answer.token_ids


async def test_without_a_key_nothing_but_health_answers(checkpoint, keys_file):
    async with running_gateway(checkpoint, front={"api_keys_file": keys_file}) as gw:
        async with AsyncPenstockClient(gw.target) as client:
            for ask in (
                lambda: client.models(deadline_s=5),
                lambda: client.generate(MODEL, PROMPT, deadline_s=5).result(),
                lambda: client.tokenize(MODEL, "a", deadline_s=5),
            ):
                with pytest.raises(UnauthenticatedError, match="no API key") as caught:
                    await ask()
                assert "Bearer" in caught.value.remedy
        assert gw.engine.requests == []
        async with grpc.aio.insecure_channel(gw.target) as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=5
            )
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        refused = await asyncio.to_thread(ask_reflection, gw.target)
        assert refused.code() is grpc.StatusCode.UNAUTHENTICATED
        assert dict(refused.trailing_metadata())["penstock-error-code"] == "unauthenticated"


def ask_reflection(target):
    with grpc.insecure_channel(target) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        wish = reflection_pb2.ServerReflectionRequest(list_services="")
        with pytest.raises(grpc.RpcError) as refused:
            next(stub.ServerReflectionInfo(iter([wish]), timeout=5))
        return refused.value


@pytest.mark.parametrize("key", ["sk-ann", "sk-other"])
async def test_with_a_key_all_is_as_without(checkpoint, keys_file, key):
    async with running_gateway(checkpoint) as gw, AsyncPenstockClient(gw.target) as client:
        wanted = await generated(client)
    async with (
        running_gateway(checkpoint, front={"api_keys_file": keys_file}) as gw,
        AsyncPenstockClient(gw.target, api_key=key) as client,
    ):
        assert await generated(client) == wanted
        assert [model.name for model in await client.models()] == [MODEL]


@pytest.mark.parametrize("key", ["sk-annx", "sk-an", "x" * 10_000])
async def test_a_wrong_key(checkpoint, keys_file, key):
    async with (
        running_gateway(checkpoint, front={"api_keys_file": keys_file}) as gw,
        AsyncPenstockClient(gw.target, api_key=key) as client,
    ):
        with pytest.raises(UnauthenticatedError, match="not known"):
            await generated(client)


@pytest.mark.parametrize("key", ["", "two words", "schlüssel", "sk-geheim\n"])
def test_a_key_that_cannot_be_sent(key):
    with pytest.raises(ConfigError, match="API key") as caught:
        PenstockClient("localhost:1", api_key=key)
    assert not key or key.strip() not in str(caught.value)


async def test_tls_and_key_for_both_clients(checkpoint, keys_file, authority, server):
    front = {"api_keys_file": keys_file, "tls": tls_plan(server)}
    credentials = tls_credentials(authority.certificate)
    async with running_gateway(checkpoint, front=front) as gw:
        async with AsyncPenstockClient(
            gw.target, api_key="sk-ann", credentials=credentials
        ) as client:
            wanted = await generated(client)

        def blocking():
            with PenstockClient(gw.target, api_key="sk-ann", credentials=credentials) as client:
                [answer] = client.generate(MODEL, PROMPT, max_tokens=3, deadline_s=10).result()
                return answer.token_ids

        assert await asyncio.to_thread(blocking) == wanted
        async with AsyncPenstockClient(gw.target, credentials=credentials) as client:
            with pytest.raises(UnauthenticatedError):
                await client.models(deadline_s=5)


async def test_a_stranger_s_certificate_is_not_trusted(checkpoint, tmp_path, server):
    stranger = Authority(tmp_path / "other", "stranger")
    async with (
        running_gateway(checkpoint, front={"tls": tls_plan(server)}) as gw,
        AsyncPenstockClient(gw.target, credentials=tls_credentials(stranger.certificate)) as client,
    ):
        with pytest.raises(UnavailableError, match="No gateway answers"):
            await client.models(deadline_s=2)


async def test_client_certificates(checkpoint, tmp_path, authority, server):
    clients = Authority(tmp_path / "clients", "clients")
    ann = clients.issue("ann", names=())
    mallory = Authority(tmp_path / "evil", "evil").issue("mallory", names=())
    front = {"tls": tls_plan(server, clients.certificate)}
    async with running_gateway(checkpoint, front=front) as gw:

        async def ask(pair):
            credentials = tls_credentials(
                authority.certificate,
                client_cert=pair and pair.certificate,
                client_key=pair and pair.key,
            )
            async with AsyncPenstockClient(gw.target, credentials=credentials) as client:
                return await client.models(deadline_s=2)

        assert [model.name for model in await ask(ann)] == [MODEL]
        with pytest.raises(UnauthenticatedError, match="no client certificate"):
            await ask(None)
        with pytest.raises(UnavailableError):
            await ask(mallory)
        credentials = tls_credentials(authority.certificate)
        async with grpc.aio.secure_channel(gw.target, credentials) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_plain_text_on_the_tls_port_and_the_other_way_round(checkpoint, authority, server):
    async with (
        running_gateway(checkpoint, front={"tls": tls_plan(server)}) as gw,
        AsyncPenstockClient(gw.target) as client,
    ):
        with pytest.raises(UnavailableError, match="whether it speaks TLS"):
            await client.models(deadline_s=2)
        assert gw.front._connections == set()
    async with (
        running_gateway(checkpoint) as gw,
        AsyncPenstockClient(
            gw.target, credentials=tls_credentials(authority.certificate)
        ) as client,
    ):
        with pytest.raises(UnavailableError):
            await client.models(deadline_s=2)


@pytest.mark.parametrize("say", [b"", b"\x16\x03\x01\x02\x00", b"GET / HTTP/1.1\r\n\r\n"])
async def test_whoever_does_not_finish_the_handshake_is_closed(checkpoint, server, say):
    async with running_gateway(checkpoint, front={"tls": tls_plan(server)}) as gw:
        gw.front._listener._handshake_s = 0.3
        reader, writer = await asyncio.open_connection(*gw.target.split(":"))
        writer.write(say)
        begun_s = time.monotonic()
        async with asyncio.timeout(5.0):
            while await reader.read(1024):
                pass
        assert time.monotonic() - begun_s < 2.0
        assert gw.front._connections == set()
        assert gw.front._listener.num_handshakes == 0
        writer.close()


async def test_handshakes_at_once_are_bounded(checkpoint, authority, server):
    async with running_gateway(checkpoint, front={"tls": tls_plan(server)}) as gw:
        gw.front._listener._max_handshakes = 2
        idle = [await asyncio.open_connection(*gw.target.split(":")) for _ in range(2)]
        await asyncio.sleep(0.05)
        reader, third = await asyncio.open_connection(*gw.target.split(":"))
        async with asyncio.timeout(5.0):
            with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
                await reader.readexactly(1)
        for _, writer in [*idle, (reader, third)]:
            writer.close()
        await asyncio.sleep(0.05)
        credentials = tls_credentials(authority.certificate)
        async with AsyncPenstockClient(gw.target, credentials=credentials) as client:
            assert await client.models(deadline_s=5)


async def test_only_new_enough_tls_with_http2(checkpoint, authority, server):
    async with running_gateway(checkpoint, front={"tls": tls_plan(server)}) as gw:
        host, port = gw.target.split(":")
        context = ssl.create_default_context(cafile=authority.certificate)
        context.set_alpn_protocols(["http/1.1", "h2"])
        _, writer = await asyncio.open_connection(host, port, ssl=context)
        assert writer.get_extra_info("ssl_object").selected_alpn_protocol() == "h2"
        writer.close()
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        _, writer = await asyncio.open_connection(host, port, ssl=context)
        assert writer.get_extra_info("ssl_object").version() == "TLSv1.2"
        writer.close()


def test_data_right_behind_the_handshake_is_not_lost_on_either_loop(server, authority):
    """Under Ray a gateway runs on uvloop; the suite runs on asyncio's own loop."""

    class Echo(asyncio.Protocol):
        def connection_made(self, transport):
            self.transport = transport

        def data_received(self, data):
            self.transport.write(data.upper())

    async def ask():
        sock = listening_socket("127.0.0.1", 0, "")
        port = sock.getsockname()[1]
        listener = TlsListener(sock, Echo, GatewayTls(tls_plan(server)).http)
        context = ssl.create_default_context(cafile=authority.certificate)
        found = []
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            context.maximum_version = version
            for _ in range(20):
                reader, writer = await asyncio.open_connection(
                    "127.0.0.1", port, ssl=context, server_hostname="localhost"
                )
                writer.write(b"hello")
                found.append(await asyncio.wait_for(reader.readexactly(5), 5))
                writer.close()
        listener.close()
        return found

    assert asyncio.run(ask()) == [b"HELLO"] * 40
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(ask()) == [b"HELLO"] * 40
