"""Keys and certificates are looked at before anything starts, with the line of the key at fault."""

import pytest

from cluster.base.load import load_cluster_file
from cluster.base.problems import ClusterFileError
from cluster.planner.front import plan_access
from cluster.planner.front_files import certificate_name, check_front_files
from tests.support.certificates import Authority, tls_plan

TEXT = """models: [{{name: m, path: .}}]
gateway:
  host: {host}
  api_keys_file: {keys}
  tls:
    certificate: {certificate}
    key: {key}
    client_ca: {client_ca}
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "keys").write_text("sk-1\n")
    (tmp_path / "keys").chmod(0o600)
    authority = Authority(tmp_path, "ca")
    for name, more in {
        "good": {},
        "other": {},
        "expired": {"begins": -10, "ends": -1},
        "early": {"begins": 3, "ends": 9},
        "soon": {"ends": 3},
        "nameless": {"names": ()},
        "locked": {"password": b"secret"},
    }.items():
        authority.issue(name, **more)
    (tmp_path / "text").write_text("hello")
    return tmp_path


def written(folder, **changes):
    values = {
        "host": "127.0.0.1",
        "keys": "keys",
        "certificate": "good.crt",
        "key": "good.key",
        "client_ca": "ca.pem",
        **changes,
    }
    file = folder / "c.yaml"
    file.write_text(TEXT.format(**values))
    return load_cluster_file(file)


def test_good_files_raise_no_word(folder):
    assert check_front_files(written(folder)) == []


def test_without_the_keys_there_is_nothing_to_look_at(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("models: [{name: m, path: .}]\n")
    assert check_front_files(load_cluster_file(file)) == []


@pytest.mark.parametrize(
    ("changes", "line", "param", "cause"),
    [
        ({"keys": "none"}, 4, "api_keys_file", "cannot be read: No such file"),
        ({"keys": "text#"}, 4, "api_keys_file", "No such file"),
        ({"keys": "ca.pem"}, 4, "api_keys_file", "neither a key nor a name"),
        ({"certificate": "none"}, 6, "tls.certificate", "cannot be read: No such file"),
        ({"certificate": "text"}, 6, "tls.certificate", "no certificate in PEM form"),
        ({"key": "none"}, 7, "tls.key", "cannot be read: No such file"),
        ({"key": "other.key"}, 7, "tls.key", "is not the key of"),
        ({"certificate": "locked.crt", "key": "locked.key"}, 7, "tls.key", "is encrypted"),
        ({"key": "text"}, 6, "tls.certificate", "is not in PEM form"),
        ({"client_ca": "none"}, 8, "tls.client_ca", "cannot be read: No such file"),
        ({"client_ca": "text"}, 8, "tls.client_ca", "is not in PEM form"),
    ],
)
def test_what_a_gateway_could_not_use(folder, changes, line, param, cause):
    with pytest.raises(ClusterFileError) as caught:
        check_front_files(written(folder, **changes))
    (problem,) = caught.value.problems
    assert (problem.line, problem.param) == (line, f"gateway.{param}")
    assert cause in problem.message
    assert caught.value.remedy


def test_a_file_without_keys_is_refused(folder):
    (folder / "keys").write_text("# none yet\n")
    with pytest.raises(ClusterFileError, match="has no keys"):
        check_front_files(written(folder))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("expired", "expired on"),
        ("early", "is not valid before"),
        ("soon", "expires on"),
        ("nameless", "no subject alternative name"),
    ],
)
def test_what_clients_will_not_like(folder, name, words):
    (warning,) = check_front_files(written(folder, certificate=f"{name}.crt", key=f"{name}.key"))
    assert words in warning


def test_files_that_others_may_read(folder):
    (folder / "keys").chmod(0o644)
    (folder / "good.key").chmod(0o660)
    first, second = check_front_files(written(folder))
    assert "api_keys_file" in first
    assert "may read" in first
    assert "gateway.tls.key" in second
    assert "group may change" in second


def test_paths_are_relative_to_the_file(folder):
    file = written(folder)
    keys, tls = plan_access(file.spec.gateway, file.directory)
    assert keys == str(folder / "keys")
    assert tls.certificate == str(folder / "good.crt")
    assert tls.client_ca == str(folder / "ca.pem")


def test_what_a_certificate_is_for(folder):
    authority = Authority(folder / "more", "more")
    assert certificate_name(tls_plan(authority.issue("a"))) == "localhost"
    assert certificate_name(tls_plan(authority.issue("b", names=()))) == ""


def test_tls_needs_both_files(folder):
    file = folder / "c.yaml"
    file.write_text("models: [{name: m, path: .}]\ngateway:\n  tls: {certificate: a}\n")
    with pytest.raises(ClusterFileError, match=r"c\.yaml:3: gateway\.tls\.key: is required"):
        load_cluster_file(file)
