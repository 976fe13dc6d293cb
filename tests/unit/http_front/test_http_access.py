"""Keys and TLS at the HTTP front, met by the `openai` client and by sockets that mean no good."""

import asyncio
import contextlib
import ssl
import time

import httpx
import openai
import pytest
from scripted_handler import MODEL, SCRIPT, gateway_plan
from test_connections import COMPLETION, post

from router.access.api_keys import ApiKeys, NamedKey
from router.access.guard import AccessGuard
from router.access.tls import GatewayTls
from router.http.app import build_http_app
from router.http.limits import HttpLimits
from router.http.server import serve_http
from router.listen import listening_socket
from tests.support.certificates import Authority, tls_plan

TEXT = "".join(SCRIPT)
KEYS = ApiKeys([NamedKey(name="ann", key="sk-ann")])


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def server(authority):
    return authority.issue("gateway")


@pytest.fixture
def serving(handler, registry):
    @contextlib.asynccontextmanager
    async def start(guard=None, tls=None, limits=None):
        guard = guard or AccessGuard(KEYS)
        app = build_http_app(handler, gateway_plan(), registry, limits=limits, guard=guard)
        running = await serve_http(
            app,
            listening_socket("127.0.0.1", 0, "gateway.http_port"),
            limits=limits,
            drain_s=1.0,
            tls=tls,
        )
        try:
            yield running.port
        finally:
            await running.stop()

    return start


def client_of(url, key, **http):
    return openai.AsyncOpenAI(
        base_url=f"{url}/v1",
        api_key=key,
        max_retries=0,
        timeout=10,
        http_client=httpx.AsyncClient(**http),
    )


async def completed(client):
    answer = await client.completions.create(model=MODEL, prompt="abc", max_tokens=50)
    return answer.choices[0].text


@pytest.mark.parametrize("key", ["sk-annx", "sk-an", "x" * 10_000])
async def test_a_wrong_key(serving, key):
    async with serving() as port, client_of(f"http://127.0.0.1:{port}", key) as client:
        for ask in (lambda: completed(client), client.models.list):
            with pytest.raises(openai.AuthenticationError) as caught:
                await ask()
            error = caught.value
            assert error.status_code == 401
            assert (error.code, error.type) == ("unauthenticated", "invalid_request_error")
            assert "Bearer KEY" in error.message
            assert "sk-" not in error.message
            assert error.response.headers["www-authenticate"] == 'Bearer realm="penstock"'
            assert error.response.headers["x-request-id"]


async def test_the_right_key(serving):
    async with serving() as port, client_of(f"http://127.0.0.1:{port}", "sk-ann") as client:
        assert await completed(client) == TEXT
        assert [model.id for model in (await client.models.list()).data] == [MODEL]


async def test_what_is_open_and_what_is_not(serving):
    async with (
        serving() as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        statuses = {
            path: (await client.get(path)).status_code
            for path in (
                "/healthz", "/readyz", "/metrics", "/v1/models", "/nothing", "/healthz/",
                "/v1/../healthz", "//healthz", "/metrics/x", "/%68ealthz",
            )
        }  # fmt: skip
        odd = await client.get("/v1/models", headers=[("authorization", "Bearer sk-ann")] * 2)
        posted = await client.post("/tokenize", json={"model": MODEL, "prompt": "a"})
        basic = await client.get("/v1/models", auth=("ann", "sk-ann"))
    is_open = {"/healthz", "/readyz", "/metrics", "/%68ealthz", "/v1/../healthz"}
    assert {path for path, status in statuses.items() if status != 401} == is_open
    assert statuses["/healthz"] == statuses["/metrics"] == 200
    assert (odd.status_code, posted.status_code, basic.status_code) == (401, 401, 401)


@pytest.mark.parametrize("value", [b"", b"\xff\xfe\x80", b"Bearer \xc3\xbc", b"bearer", b"Bearer"])
async def test_bytes_that_are_no_key(serving, value):
    async with serving() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        data = post(COMPLETION)
        head, body = data.split(b"\r\n\r\n", 1)
        writer.write(head + b"\r\nAuthorization: " + value + b"\r\n\r\n" + body)
        async with asyncio.timeout(5.0):
            answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 401"), answer
        writer.close()


async def test_a_huge_body_without_a_key_is_not_read(serving):
    async with serving() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: f\r\nContent-Type: application/json\r\n"
            b"Content-Length: 4000000\r\n\r\n"
        )
        async with asyncio.timeout(5.0):
            assert (await reader.readline()).startswith(b"HTTP/1.1 401")
        writer.close()


async def test_the_openai_client_over_tls(serving, authority, server):
    tls = GatewayTls(tls_plan(server))
    trust = ssl.create_default_context(cafile=authority.certificate)
    async with serving(tls=tls.http) as port:
        url = f"https://localhost:{port}"
        async with client_of(url, "sk-ann", verify=trust) as client:
            assert await completed(client) == TEXT
            stream = await client.completions.create(
                model=MODEL, prompt="abc", max_tokens=50, stream=True
            )
            assert "".join([chunk.choices[0].text async for chunk in stream]) == TEXT
        async with client_of(url, "sk-ann") as distrustful:
            with pytest.raises(openai.APIConnectionError):
                await completed(distrustful)


async def test_a_renewed_certificate_leaves_streams_alone(serving, authority, tmp_path):
    old = authority.issue("old")
    tls = GatewayTls(tls_plan(old))
    trust = ssl.create_default_context(cafile=authority.certificate)
    async with (
        serving(tls=tls.http) as port,
        client_of(f"https://localhost:{port}", "sk-ann", verify=trust) as client,
    ):
        stream = await client.completions.create(
            model=MODEL, prompt="abc", max_tokens=50, stream=True
        )
        first = await anext(aiter(stream))
        new = authority.issue("new")
        new.certificate.replace(old.certificate)
        new.key.replace(old.key)
        tls.reload()
        _, writer = await asyncio.open_connection("localhost", port, ssl=trust)
        subject = dict(field[0] for field in writer.get_extra_info("peercert")["subject"])
        assert subject["commonName"] == "new"
        writer.close()
        rest = "".join([chunk.choices[0].text async for chunk in stream])
        assert first.choices[0].text + rest == TEXT


async def test_client_certificates(serving, authority, server, tmp_path):
    clients = Authority(tmp_path, "clients")
    ann = clients.issue("ann", names=())
    tls = GatewayTls(tls_plan(server, clients.certificate))
    async with serving(AccessGuard(needs_certificate=True), tls.http) as port:
        trust = ssl.create_default_context(cafile=authority.certificate)
        async with client_of(f"https://localhost:{port}", "any", verify=trust) as client:
            with pytest.raises(openai.AuthenticationError, match="no client certificate"):
                await completed(client)
        async with httpx.AsyncClient(verify=trust) as client:
            assert (await client.get(f"https://localhost:{port}/readyz")).status_code == 200
        trust.load_cert_chain(ann.certificate, ann.key)
        async with client_of(f"https://localhost:{port}", "any", verify=trust) as client:
            assert await completed(client) == TEXT


@pytest.mark.parametrize(
    "say", [b"", b"\x16\x03\x01\x02\x00", b"GET /healthz HTTP/1.1\r\nHost: f\r\n\r\n"]
)
async def test_whoever_does_not_finish_the_handshake_is_closed(serving, server, say):
    limits = HttpLimits(head_timeout_s=0.3)
    async with serving(tls=GatewayTls(tls_plan(server)).http, limits=limits) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(say)
        begun_s = time.monotonic()
        async with asyncio.timeout(5.0):
            assert b"200" not in await reader.read()
        assert time.monotonic() - begun_s < 2.0
        writer.close()


async def test_tls_on_the_plain_port_is_answered_at_once(serving, authority):
    trust = ssl.create_default_context(cafile=authority.certificate)
    async with serving() as port, asyncio.timeout(5.0):
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.open_connection("localhost", port, ssl=trust)
