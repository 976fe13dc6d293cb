"""Clusters on record: only living ones count, and the user is told what to do otherwise."""

import os

import pytest

from cluster.base.errors import ConfigError
from cluster.control import run_state
from cluster.control.run_state import RunState


@pytest.fixture(autouse=True)
def _own_state_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("PENSTOCK_STATE_DIR", str(tmp_path))


def state(name: str, *, pid: int | None = None, started: str | None = None) -> RunState:
    pid = os.getpid() if pid is None else pid
    return RunState(
        name=name,
        pid=pid,
        pid_started=run_state.process_started(pid) if started is None else started,
        grpc="127.0.0.1:50051",
        http="http://127.0.0.1:8000",
        dashboard_url="",
        dashboard_token=False,
        ray_address="127.0.0.1:6379",
        models=("m",),
        ready=True,
    )


def test_round_trip_and_removal():
    run_state.write(state("demo"))
    assert run_state.read("demo") == state("demo")
    assert run_state.only(None).name == "demo"
    run_state.remove("demo", pid=1)
    assert run_state.read("demo") is not None, "another process's record stays"
    run_state.remove("demo", pid=os.getpid())
    assert run_state.read("demo") is None


@pytest.mark.parametrize("started", ["", "12"])
def test_a_dead_or_reused_pid_counts_as_absent(started):
    run_state.write(state("demo", started=started))
    assert run_state.read("demo") is None
    assert run_state.running() == []


def test_a_damaged_record_counts_as_absent(tmp_path):
    run_state.write(state("demo"))
    (tmp_path / "clusters" / "demo.json").write_text("{")
    assert run_state.running() == []


def test_a_name_in_use_is_refused_and_ones_own_is_not():
    run_state.check_free("demo")
    run_state.write(state("demo"))
    run_state.check_free("demo")
    parent = os.getppid()
    run_state.write(state("demo", pid=parent))
    with pytest.raises(ConfigError, match=rf"already runs on this machine \(pid {parent}\)"):
        run_state.check_free("demo")


def test_choosing_a_cluster():
    with pytest.raises(ConfigError, match="No cluster runs"):
        run_state.only(None)
    run_state.write(state("a"))
    run_state.write(state("b"))
    with pytest.raises(ConfigError, match="Several clusters run here: a, b"):
        run_state.only(None)
    assert run_state.only("b").name == "b"
    with pytest.raises(ConfigError, match="No cluster named 'c' runs"):
        run_state.only("c")
