"""A cluster with keys and TLS: `up`, `status` and `generate` need no more words, strangers do."""

import os
import ssl

import httpx
import pytest

from cluster.base.errors import UnauthenticatedError
from router.client import PenstockClient, tls_credentials
from tests.e2e.conftest import CLUSTER, MODEL, penstock, start_cluster, stop_cluster
from tests.support.certificates import Authority

pytestmark = pytest.mark.e2e

SECURED = CLUSTER.replace(
    "http_port: {http}}}",
    "http_port: {http}, api_keys_file: keys, tls: {{certificate: gateway.crt, key: gateway.key}}}}",
).replace("replicas: 2", "replicas: 1")


@pytest.fixture(scope="module")
def secured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("secured")
    (folder / "keys").write_text("ann: sk-ann\n")
    authority = Authority(folder, "ca")
    authority.issue("gateway")
    running = start_cluster(folder, "secured", MODEL, SECURED)
    try:
        yield running, folder, authority
    finally:
        stop_cluster(running)


def test_commands_of_this_machine_find_key_and_certificate(secured):
    running, _, _ = secured
    answer = penstock("status", env=running.env)
    assert answer.returncode == 0, answer.stderr
    assert "1/1" in answer.stdout
    answer = penstock("generate", "def ", "--max-tokens", "4", env=running.env)
    assert answer.returncode == 0, answer.stderr
    log = running.log.read_text()
    assert "https://127.0.0.1" in log
    assert "may read it (mode 0644)" in log.replace("\n", " ")
    assert "sk-ann" not in log


def test_strangers_need_both(secured):
    running, _, authority = secured
    ca = ("--ca-cert", str(authority.certificate), "--address", running.grpc)
    answer = penstock("status", *ca, env={**running.env, "PENSTOCK_API_KEY": ""})
    assert (answer.returncode, "no API key" in answer.stderr) == (2, True)
    answer = penstock("status", *ca, env={**running.env, "PENSTOCK_API_KEY": "sk-ann"})
    assert answer.returncode == 0, answer.stderr
    answer = penstock("status", "--address", running.grpc, env=running.env)
    assert "whether it speaks TLS" in answer.stderr


def test_a_new_key_counts_without_a_restart(secured):
    running, folder, authority = secured
    change_keys(folder, "bob: sk-bob")
    try:
        running.wait_for(
            lambda: knows(running, authority, "sk-bob") and not knows(running, authority, "sk-ann"),
            timeout_s=20,
        )
        url = f"https://localhost:{running.http.rpartition(':')[2]}"
        trust = ssl.create_default_context(cafile=authority.certificate)
        with httpx.Client(verify=trust) as client:
            assert client.get(f"{url}/readyz").status_code == 200
            assert client.get(f"{url}/v1/models").status_code == 401
            headers = {"authorization": "Bearer sk-bob"}
            assert client.get(f"{url}/v1/models", headers=headers).status_code == 200
    finally:
        change_keys(folder, "ann: sk-ann")
        running.wait_for(lambda: knows(running, authority, "sk-ann"), timeout_s=20)


def change_keys(folder, text):
    draft = folder / "keys.new"
    draft.write_text(text)
    os.replace(draft, folder / "keys")


def knows(running, authority, key):
    credentials = tls_credentials(authority.certificate)
    with PenstockClient(running.grpc, api_key=key, credentials=credentials) as client:
        try:
            return bool(client.models(deadline_s=10))
        except UnauthenticatedError:
            return False
