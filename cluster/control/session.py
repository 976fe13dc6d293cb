"""A foreground cluster session: up, on record, until a signal, down.

This is `penstock up` without its display: it ties runtime, run and record together so that every
way out (ready and signalled, failed, interrupted while starting) takes everything down again.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from ray.exceptions import RayError

from cluster.base import names
from cluster.base.errors import CancelledError, UnavailableError
from cluster.base.load import ClusterFile, parse_cluster_text
from cluster.base.plan import ClusterPlan, to_json
from cluster.control import own_gateway, ray_runtime, run_state
from cluster.control.control_socket import ControlServer, Tell
from cluster.control.lifecycle import ClusterRun
from cluster.control.live_edit import LiveEdit, PlannedEdit
from cluster.control.ports import check_dashboard_port, check_gateway_ports
from cluster.control.ray_runtime import RayRuntime
from cluster.control.readiness import Snapshot
from cluster.control.run_state import RunState
from cluster.dist.topology import Topology
from cluster.planner.front_files import certificate_name
from cluster.planner.hub import Hub

_WATCH_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A cluster file, what it was planned for, and the plan."""

    file: ClusterFile
    topology: Topology
    plan: ClusterPlan
    hub: Hub


class ClusterSession:
    """Runs one plan from this process, and changes it as the file is edited.

    Args:
        planned: what to run.
        joined: the Ray runtime to deploy on; None starts one here and ends it afterwards.
        timeout_s: how long start-up may take.
    """

    def __init__(self, planned: Planned, *, joined: RayRuntime | None, timeout_s: float) -> None:
        self._plan = planned.plan
        self._topology = planned.topology
        self._edit = LiveEdit(planned.file, planned.topology, planned.hub)
        self._joined = joined
        self._timeout_s = timeout_s
        self._stop = threading.Event()
        self._run: ClusterRun | None = None
        self._control: ControlServer | None = None
        self.phases_s: dict[str, float] = {}
        """Start-up ledger: seconds of each phase."""

    def request_stop(self) -> None:
        """End the session; callable from a signal handler."""
        self._stop.set()

    @contextmanager
    def up(
        self, on_phase: Callable[[str], None], on_progress: Callable[[Snapshot], None]
    ) -> Iterator[RunState]:
        """Bring the cluster up; it is down again when the context ends, however it ends.

        Raises:
            ConfigError: a port is taken, the name is taken, Ray cannot be joined.
            CancelledError: `request_stop` was called while starting.
            PenstockError: why a replica could not start.
        """
        run_state.check_free(self._plan.name)
        runtime = self._runtime(on_phase)
        run = self._run = ClusterRun(self._plan, runtime)
        try:
            on_phase("deploying")
            started_s = time.monotonic()
            run.start()
            self._mark("deploy", started_s)
            self._record(run)
            started_s = time.monotonic()
            run.wait_ready(self._timeout_s, lambda snapshot: self._progress(snapshot, on_progress))
            self._mark("replicas", started_s)
            self._control = ControlServer(self._obey)
            yield self._record(run, ready=True)
        finally:
            on_phase("stopping")
            self._stop.set()
            if self._control is not None:
                self._control.close()
            run.stop()
            ray_runtime.leave()
            run_state.remove(self._plan.name, os.getpid())

    def _runtime(self, on_phase: Callable[[str], None]) -> RayRuntime:
        check_gateway_ports(self._plan)
        if self._joined is not None:
            return self._joined
        check_dashboard_port(self._plan)
        on_phase("starting Ray")
        started_s = time.monotonic()
        # What the plan was made with: replicas reserve parts of it.
        (node,) = self._topology.nodes
        runtime = ray_runtime.start_local(
            dashboard_port=self._plan.dashboard_port, memory_bytes=node.memory_bytes
        )
        self._mark("ray", started_s)
        return runtime

    def wait(
        self, on_change: Callable[[Snapshot], None], follow: Callable[[], None] | None = None
    ) -> None:
        """Block until `request_stop`; meanwhile tell `on_change` once a second how replicas are.

        Args:
            follow: called once a second too.
        """
        while not self._stop.wait(timeout=_WATCH_S):
            # The directory may be starting anew; the cluster serves without it.
            with suppress(RayError, TimeoutError):
                if self._run is not None:
                    on_change(self._run.snapshot())
            if follow is not None:
                follow()

    def apply(
        self,
        edited: ClusterFile,
        on_plan: Callable[[PlannedEdit, ClusterPlan], bool],
        on_progress: Callable[[Snapshot], None],
        timeout_s: float | None = None,
    ) -> None:
        """Change the running cluster to an edited file; raises as `LiveEdit.apply`.

        Args:
            on_plan: gets the edit and what runs before it; False leaves everything as it is.
        """
        run = self._run
        if run is None or self._control is None:
            raise UnavailableError("The cluster is still starting.", "Try again when it is ready.")
        self._edit.apply(
            run,
            edited,
            lambda edit: on_plan(edit, run.plan),
            timeout_s=timeout_s or self._timeout_s,
            on_progress=lambda snapshot: self._progress(snapshot, on_progress),
        )
        self._record(run, ready=True)

    def _obey(self, question: dict[str, Any], tell: Tell) -> None:
        """A question of `penstock apply`."""
        edited = parse_cluster_text(question["text"], Path(question["path"]))

        def on_plan(edit: PlannedEdit, before: ClusterPlan) -> bool:
            edit.changes.expect(question["only"])
            tell(
                {
                    "plan": to_json(edit.plan),
                    "lines": edit.lines(before),
                    "warnings": list(edit.plan.warnings) if edit.changes else [],
                }
            )
            return not question["dry_run"]

        self.apply(
            edited,
            on_plan,
            lambda snapshot: tell({"snapshot": to_json(snapshot)}),
            question["timeout_s"],
        )

    def _progress(self, snapshot: Snapshot, on_progress: Callable[[Snapshot], None]) -> None:
        if self._stop.is_set():
            raise CancelledError("The cluster was stopped meanwhile.")
        on_progress(snapshot)

    def _mark(self, phase: str, started_s: float) -> None:
        self.phases_s[phase] = round(time.monotonic() - started_s, 3)

    def _record(self, run: ClusterRun, *, ready: bool = False) -> RunState:
        gateway = run.plan.gateway
        state = RunState(
            name=self._plan.name,
            pid=os.getpid(),
            pid_started=run_state.process_started(os.getpid()),
            grpc=names.authority(gateway.host, gateway.grpc_port),
            http=own_gateway.url(gateway),
            dashboard_url=run.runtime.dashboard_url,
            dashboard_token=run.runtime.token_auth,
            ray_address=run.runtime.address,
            models=tuple(model.name for model in run.plan.models),
            ready=ready,
            file=str(self._edit.file.path.resolve()),
            control=self._control.path if self._control is not None else "",
            api_keys_file=gateway.api_keys_file or "",
            certificate=gateway.tls.certificate if gateway.tls is not None else "",
            server_name=certificate_name(gateway.tls) if gateway.tls is not None else "",
        )
        run_state.write(state)
        return state


@contextmanager
def stop_on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Let SIGINT and SIGTERM call `stop` once; a second one interrupts the hard way."""

    def handle(signum: int, frame: FrameType | None) -> None:
        stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
