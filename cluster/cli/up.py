"""`penstock up`: start or join Ray, deploy, show progress, serve until Ctrl-C."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import click

from cluster.base.env import read_environment
from cluster.base.errors import UnavailableError
from cluster.base.load import load_cluster_file
from cluster.base.plan import ClusterPlan
from cluster.cli.console import console, print_warning
from cluster.cli.seconds import timeout_option
from cluster.cli.up_display import UpDisplay
from cluster.control import ray_runtime, run_state
from cluster.control.ray_runtime import RayRuntime
from cluster.control.ray_topology import ray_topology
from cluster.control.session import ClusterSession, stop_on_signals
from cluster.dist.topology import Topology
from cluster.planner.hardware import local_topology
from cluster.planner.hub import Hub
from cluster.planner.plan_file import plan_file


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--address", metavar="ADDRESS", help="Join this Ray cluster (or 'auto').")
@click.option("--detach", "-d", is_flag=True, help="Return when ready; end with `penstock down`.")
@timeout_option(600.0, "Seconds start-up may take.")
def up(file: Path, address: str | None, detach: bool, timeout: float) -> None:
    """Run the cluster that FILE describes until Ctrl-C."""
    if detach:
        _detach(file, address, timeout)
        return
    joined = None if address is None else ray_runtime.join(address)
    plan = _plan(file, local_topology() if joined is None else ray_topology())
    _serve(plan, joined, timeout)


def _plan(file: Path, topology: Topology) -> ClusterPlan:
    hub = Hub(offline=read_environment().hub_offline)
    plan = plan_file(load_cluster_file(file), topology, hub)
    for warning in plan.warnings:
        print_warning(warning)
    return plan


def _serve(plan: ClusterPlan, joined: RayRuntime | None, timeout_s: float) -> None:
    session = ClusterSession(plan, joined=joined, timeout_s=timeout_s)
    display = UpDisplay(console, plan)
    with stop_on_signals(session.request_stop), display:
        with session.up(display.phase, display.progress) as state:
            display.ready(state, session.phases_s)
            session.wait(display.changed)
        display.phase("stopped")


def _detach(file: Path, address: str | None, timeout_s: float) -> None:
    """Run the same command in a session of its own and wait until it is on record as ready."""
    name = load_cluster_file(file).spec.cluster.name
    log_path = read_environment().state_dir / "logs" / f"{name}.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.argv[0], "up", str(file), "--timeout", str(timeout_s)]
    command += [] if address is None else ["--address", address]
    with log_path.open("w") as log:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        with console.status(f"starting {name}"):
            _wait_on_record(name, child)
    except KeyboardInterrupt:
        child.terminate()
        child.wait()
        raise
    console.print(log_path.read_text().rstrip(), markup=False, soft_wrap=True)
    ended = child.poll()
    if ended is not None and ended > 0:
        raise click.exceptions.Exit(ended)  # what it says has just been printed
    if ended is not None:
        raise UnavailableError(f"The cluster did not start (signal {-ended}).")
    console.print(f"Detached; `penstock down {name}` ends it. Log: {log_path}", soft_wrap=True)


def _wait_on_record(name: str, child: subprocess.Popen[bytes]) -> None:
    """Return when the child's cluster is ready, or the child has ended."""
    while child.poll() is None:
        state = run_state.read(name)
        if state is not None and state.ready and state.pid == child.pid:
            return
        time.sleep(0.1)
