"""Questions and answers over the control socket; files that are watched."""

import stat
from pathlib import Path

import pytest

from cluster.base.errors import ConfigError, InternalError, UnavailableError
from cluster.base.problems import ClusterFileError
from cluster.control.control_socket import ControlServer, ask
from cluster.control.file_watch import FileWatch


def serve(answer):
    return ControlServer(answer)


def test_lines_come_as_they_are_told_until_the_answer_is_whole():
    def answer(question, tell):
        for number in range(question["upto"]):
            tell({"number": number})

    server = serve(answer)
    try:
        assert [line["number"] for line in ask(server.path, {"upto": 3})] == [0, 1, 2]
        assert list(ask(server.path, {"upto": 0})) == []
        assert stat.S_IMODE(Path(server.path).parent.stat().st_mode) == 0o700
    finally:
        server.close()
    assert not Path(server.path).parent.exists()
    with pytest.raises(UnavailableError, match="does not answer"):
        list(ask(server.path, {}))


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(ConfigError("no", "do", param="a.b"), ConfigError), (KeyError("x"), InternalError)],
)
def test_what_is_raised_there_is_raised_here(raised, expected):
    def answer(question, tell):
        tell({"first": True})
        raise raised

    server = serve(answer)
    try:
        lines = ask(server.path, {})
        assert next(lines) == {"first": True}
        with pytest.raises(expected) as caught:
            next(lines)
        assert getattr(raised, "param", None) == caught.value.param
    finally:
        server.close()


def test_an_edit_counts_once_it_stands_still(tmp_path):
    (tmp_path / "ckpt").mkdir()
    file = tmp_path / "c.yaml"
    file.write_text("models: [{name: m, path: ckpt}]")
    watch = FileWatch(file)
    assert watch.edited() is None
    file.write_text("models: [{name: m, pa")
    assert watch.edited() is None
    file.write_text("models: [{name: n, path: ckpt}]")
    assert watch.edited() is None
    edit = watch.edited()
    assert edit is not None
    assert edit.spec.models[0].name == "n"
    assert watch.edited() is None
    file.unlink()
    assert [watch.edited(), watch.edited()] == [None, None]
    file.write_text("models: []")
    assert watch.edited() is None
    with pytest.raises(ClusterFileError):
        watch.edited()
    assert watch.edited() is None
