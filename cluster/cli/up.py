"""`penstock up`: start or join Ray, deploy, show progress, serve until Ctrl-C."""

from __future__ import annotations

import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import click

from cluster.base.env import read_environment
from cluster.base.errors import CancelledError, PenstockError, UnavailableError
from cluster.base.load import load_cluster_file
from cluster.base.plan import ClusterPlan
from cluster.cli.console import console, print_edit, print_warning, report_error
from cluster.cli.seconds import timeout_option
from cluster.cli.up_display import UpDisplay
from cluster.control import ray_runtime, run_state
from cluster.control.file_watch import FileWatch
from cluster.control.live_edit import PlannedEdit
from cluster.control.ray_runtime import RayRuntime
from cluster.control.ray_topology import ray_topology
from cluster.control.session import ClusterSession, Planned, stop_on_signals
from cluster.dist.topology import Topology
from cluster.planner.front_files import check_front_files
from cluster.planner.hardware import local_topology
from cluster.planner.hub import Hub
from cluster.planner.plan_file import plan_file


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--address", metavar="ADDRESS", help="Join this Ray cluster (or 'auto').")
@click.option("--detach", "-d", is_flag=True, help="Return when ready; end with `penstock down`.")
@click.option("--watch", is_flag=True, help="Apply the file whenever it is edited.")
@timeout_option(600.0, "Seconds start-up may take.")
def up(file: Path, address: str | None, detach: bool, watch: bool, timeout: float) -> None:
    """Run the cluster that FILE describes until Ctrl-C.

    `penstock apply FILE` brings a running cluster to what an edited FILE says.
    """
    if detach:
        _detach(file, address, watch, timeout)
        return
    joined = None if address is None else ray_runtime.join(address)
    planned = _plan(file, local_topology() if joined is None else ray_topology())
    _serve(planned, joined, timeout, FileWatch(file) if watch else None)


def _plan(path: Path, topology: Topology) -> Planned:
    hub = Hub(offline=read_environment().hub_offline)
    file = load_cluster_file(path)
    front_warnings = check_front_files(file)
    plan = plan_file(file, topology, hub)
    for warning in (*front_warnings, *plan.warnings):
        print_warning(warning)
    return Planned(file=file, topology=topology, plan=plan, hub=hub)


def _serve(
    planned: Planned, joined: RayRuntime | None, timeout_s: float, watch: FileWatch | None
) -> None:
    session = ClusterSession(planned, joined=joined, timeout_s=timeout_s)
    display = UpDisplay(console, planned.plan)
    with stop_on_signals(session.request_stop), display:
        with session.up(display.phase, display.progress) as state:
            display.ready(state, session.phases_s)
            follow = None if watch is None else partial(_follow, watch, session, display)
            session.wait(display.changed, follow)
        display.phase("stopped")


def _follow(watch: FileWatch, session: ClusterSession, display: UpDisplay) -> None:
    """Apply the file if it was edited; an edit that cannot be leaves the cluster as it is."""

    def show(edit: PlannedEdit, before: ClusterPlan) -> bool:
        print_edit(edit.lines(before))
        return True

    try:
        edited = watch.edited()
        if edited is not None:
            session.apply(edited, show, display.changed)
            display.phase("as the file says")
    except CancelledError:
        pass  # by Ctrl-C, which ends the session
    except PenstockError as error:
        report_error(error)


def _detach(file: Path, address: str | None, watch: bool, timeout_s: float) -> None:
    """Run the same command in a session of its own and wait until it is on record as ready."""
    name = load_cluster_file(file).spec.cluster.name
    log_path = read_environment().state_dir / "logs" / f"{name}.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.argv[0], "up", str(file), "--timeout", str(timeout_s)]
    command += [] if address is None else ["--address", address]
    command += ["--watch"] if watch else []
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
        raise UnavailableError("The cluster was stopped while it started.")
    console.print(f"Detached; `penstock down {name}` ends it. Log: {log_path}", soft_wrap=True)


def _wait_on_record(name: str, child: subprocess.Popen[bytes]) -> None:
    """Return when the child's cluster is ready, or the child has ended."""
    while child.poll() is None:
        state = run_state.read(name)
        if state is not None and state.ready and state.pid == child.pid:
            return
        time.sleep(0.1)
