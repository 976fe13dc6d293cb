"""How a command reaches a cluster that asks who calls, with and without the user's help."""

import dataclasses
import os

import pytest
from click.testing import CliRunner

from cluster.base.errors import ConfigError
from cluster.cli.main import cli
from cluster.control import run_state, target
from cluster.control.run_state import RunState
from cluster.control.target import Connection, open_client
from tests.support.certificates import Authority


@pytest.fixture
def made(monkeypatch):
    """What the client was made with, instead of a client."""
    found = {}
    monkeypatch.setattr(target, "PenstockClient", lambda *a, **k: found.update(target=a[0], **k))
    return found


@pytest.fixture
def record(tmp_path, monkeypatch):
    monkeypatch.setenv("PENSTOCK_STATE_DIR", str(tmp_path / "state"))
    keys = tmp_path / "keys"
    keys.write_text("ann: sk-ann\nsk-2\n")
    pair = Authority(tmp_path, "ca").issue("gateway")
    state = RunState(
        name="demo",
        pid=os.getpid(),
        pid_started=run_state.process_started(os.getpid()),
        grpc="127.0.0.1:50051",
        http="https://127.0.0.1:8000",
        dashboard_url="",
        dashboard_token=False,
        ray_address="",
        models=("m",),
        ready=True,
        api_keys_file=str(keys),
        certificate=str(pair.certificate),
        server_name="localhost",
    )
    run_state.write(state)
    return state


def test_a_cluster_on_record_needs_no_flags(record, made):
    open_client(Connection())
    assert made["target"] == record.grpc
    assert made["api_key"] == "sk-ann"
    assert made["server_name"] == "localhost"
    assert made["credentials"] is not None


def test_what_the_user_says_goes_first(record, made, tmp_path):
    open_client(Connection(api_key="sk-flag", ca_cert=tmp_path / "ca.pem"), "sk-env")
    assert made["api_key"] == "sk-flag"
    assert made["server_name"] is None
    open_client(Connection(), "sk-env")
    assert made["api_key"] == "sk-env"


def test_keys_that_this_user_may_not_read_are_left_out(record, made):
    run_state.write(dataclasses.replace(record, api_keys_file="/nowhere", certificate=""))
    open_client(Connection())
    assert (made["api_key"], made["credentials"]) == (None, None)


def test_an_address_gets_nothing_of_a_cluster_on_record(record, made):
    open_client(Connection(address="elsewhere:1"))
    assert (made["api_key"], made["credentials"]) == (None, None)


def test_client_certificates_need_tls_and_their_key(tmp_path):
    pair = Authority(tmp_path, "ca").issue("ann")
    with pytest.raises(ConfigError, match="only shown over TLS"):
        open_client(Connection(address="a:1", client_cert=pair.certificate, client_key=pair.key))
    with pytest.raises(ConfigError, match="belong together"):
        open_client(Connection(address="a:1", tls=True, client_cert=pair.certificate))
    with pytest.raises(ConfigError, match="cannot be read"):
        open_client(Connection(address="a:1", ca_cert=tmp_path / "none"))


@pytest.mark.parametrize("command", ["generate", "chat", "status"])
def test_the_key_comes_from_the_environment(command, monkeypatch):
    asked = {}

    def open_client(wish, api_key):
        asked.update(wish=wish, key=api_key)
        raise ConfigError("enough")

    monkeypatch.setattr("cluster.cli.connection_flags.open_client", open_client)
    words = {"generate": ["x"], "chat": ["--message", "x"], "status": []}[command]
    result = CliRunner(env={"PENSTOCK_API_KEY": "sk-env", "OPENAI_API_KEY": "sk-no"}).invoke(
        cli, [command, *words, "--address", "a:1", "--tls"]
    )
    assert "enough" in result.stderr
    assert asked["key"] == "sk-env"
    assert asked["wish"] == Connection(address="a:1", tls=True)


def test_no_key_is_in_what_is_printed():
    assert "sk-1" not in repr(Connection(api_key="sk-1"))
