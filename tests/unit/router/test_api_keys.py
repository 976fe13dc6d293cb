"""API keys: what a file may say, what is compared, what is never shown."""

import asyncio
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.base.errors import ConfigError, UnauthenticatedError
from cluster.base.front_plan import GatewayPlan
from router.access.api_keys import MAX_KEYS, ApiKeys, NamedKey, exposure, read_keys
from router.access.front_access import FrontAccess
from router.access.guard import AccessGuard
from tests.support.certificates import Authority, tls_plan


def keys_of(tmp_path, text):
    file = tmp_path / "keys"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_keys(file)


def test_a_line_is_a_key_or_a_name_and_a_key(tmp_path):
    text = "\ufeff# of the team\n\nalice: sk-1 # until May\r\n  sk-2\t\nbob:\tsk=3:/+\n#sk-4\n"
    found = [(key.name, key.key) for key in keys_of(tmp_path, text)]
    assert found == [("alice", "sk-1"), ("line 4", "sk-2"), ("bob", "sk=3:/+")]


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("a: b secret-3", ":1 is neither"),
        ("secret-1 ann", ":1 is neither"),
        ("sk-1\nschlüssel-geheim", ":2: the key cannot be sent"),
        ("x" * 1025, ":1: the key cannot be sent"),
        ("ann: secret-1\nbob: secret-1", ":2 repeats the key of ann"),
        (b"\xff\xfe", "is not UTF-8"),
        ("\n".join(f"secret-{n}" for n in range(MAX_KEYS + 1)), f"has {MAX_KEYS + 1} keys"),
        ("#" * (1 << 20) + "#", "larger than 1 MiB"),
    ],
)
def test_what_a_file_may_not_say_is_refused_without_showing_it(tmp_path, text, cause):
    with pytest.raises(ConfigError, match=cause) as caught:
        keys_of(tmp_path, text)
    assert "secret" not in str(caught.value)
    assert "geheim" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_keys(tmp_path / "none")
    with pytest.raises(ConfigError, match="Is a directory"):
        read_keys(tmp_path)


def test_who_else_may_read_it(tmp_path):
    file = tmp_path / "keys"
    file.write_text("sk-1")
    found = {}
    for mode in (0o600, 0o640, 0o440, 0o644, 0o660):
        file.chmod(mode)
        found[mode] = exposure(file)
    assert [mode for mode, who in found.items() if who] == [0o644, 0o660]


def test_no_key_is_in_what_is_printed():
    assert "secret" not in repr(NamedKey(name="a", key="secret"))


@given(st.binary(max_size=200))
def test_only_the_very_keys_are_accepted(given_key):
    keys = ApiKeys([NamedKey(name="a", key="sk-1"), NamedKey(name="b", key="sk-22")])
    assert keys.accept(given_key) == (given_key in (b"sk-1", b"sk-22"))


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [b""],
        [b"Bearer"],
        [b"Bearer "],
        [b"sk-1"],
        [b"Basic sk-1"],
        [b"Bearer sk-1x"],
        [b"Bearer sk-1", b"Bearer sk-1"],
        [b"Bearer " + b"x" * 100_000],
        [b"Bearer \xff\x00\xc3"],
        [b"Bearersk-1"],
    ],
)
def test_hostile_headers(headers):
    guard = AccessGuard(ApiKeys([NamedKey(name="a", key="sk-1")]))
    with pytest.raises(UnauthenticatedError) as caught:
        guard.check(headers, has_certificate=False)
    assert caught.value.remedy
    assert "sk-1" not in str(caught.value)


def test_the_scheme_is_any_case_and_nobody_is_asked_without_keys():
    guard = AccessGuard(ApiKeys([NamedKey(name="a", key="sk-1")]))
    for scheme in (b"Bearer", b"bearer", b"BEARER"):
        guard.check([scheme + b" sk-1"], has_certificate=False)
    AccessGuard().check([], has_certificate=False)
    both = AccessGuard(ApiKeys([NamedKey(name="a", key="sk-1")]), needs_certificate=True)
    both.check([b"Bearer sk-1"], has_certificate=True)
    with pytest.raises(UnauthenticatedError, match="certificate"):
        both.check([b"Bearer sk-1"], has_certificate=False)


def front(tmp_path, **changes):
    fields = {"host": "127.0.0.1", "grpc_port": 0, "http_port": 0, "replicas": 1, "limits": None}
    return FrontAccess(GatewayPlan(**fields, **changes))


def passes(access, key):
    try:
        access.guard.check([b"Bearer " + key], has_certificate=False)
    except UnauthenticatedError:
        return False
    return True


def replace(file, text):
    """As editors and Kubernetes do: another file in its place."""
    draft = file.with_suffix(".new")
    draft.write_text(text)
    os.replace(draft, file)


def look(access):
    for files in access._files:
        files.look()


def test_keys_follow_their_file(tmp_path, caplog):
    file = tmp_path / "keys"
    file.write_text("ann: sk-1")
    access = front(tmp_path, api_keys_file=str(file))
    replace(file, "bob: sk-2")
    look(access)
    assert (passes(access, b"sk-1"), passes(access, b"sk-2")) == (False, True)
    assert "bob" in caplog.text
    assert "sk-2" not in caplog.text
    replace(file, "one two three")
    look(access)
    look(access)
    assert passes(access, b"sk-2"), "a file that cannot be used changes nothing"
    assert caplog.text.count("cannot be used") == 1
    file.unlink()
    look(access)
    assert passes(access, b"sk-2")
    replace(file, "# nobody\n")
    look(access)
    assert not passes(access, b"sk-2"), "no keys: nobody"


def test_certificates_follow_their_files_and_a_half_changed_pair_does_not(tmp_path):
    authority = Authority(tmp_path)
    pair, other = authority.issue("one"), authority.issue("two")
    access = front(tmp_path, tls=tls_plan(pair))
    first = access.tls.grpc()
    os.replace(other.certificate, pair.certificate)
    look(access)
    assert access.tls.grpc() is first, "the key is not its yet"
    os.replace(other.key, pair.key)
    look(access)
    assert access.tls.grpc() is not first


async def test_the_files_are_looked_at_by_themselves(tmp_path):
    file = tmp_path / "keys"
    file.write_text("sk-1")
    access = front(tmp_path, api_keys_file=str(file))
    access.start(look_s=0.01)
    replace(file, "sk-2")
    async with asyncio.timeout(5.0):
        while not passes(access, b"sk-2"):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await access.stop()
