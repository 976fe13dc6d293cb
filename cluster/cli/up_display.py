"""What `penstock up` shows: live bars on a terminal, one line per change anywhere else."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from cluster.base.plan import ClusterPlan
from cluster.control.readiness import Snapshot
from cluster.control.run_state import RunState
from replicas.leader.record import ReplicaRecord, ReplicaState

_BAR_CELLS = 20
_SHORT_ID = 8


class UpDisplay:
    """Shows one session; use as a context manager."""

    def __init__(self, console: Console, plan: ClusterPlan) -> None:
        self._console = console
        self._plan = plan
        self._live: Live | None = None
        self._shown: dict[str, str] = {}

    def __enter__(self) -> UpDisplay:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end_live()

    def phase(self, name: str) -> None:
        """Announce a phase of the session."""
        self._end_live()
        self._console.print(f"[bold]{self._plan.name}[/]: {name}", highlight=False)

    def progress(self, snapshot: Snapshot) -> None:
        """Show every replica's state."""
        news = self._news(snapshot)
        if self._console.is_terminal:
            if self._live is None:
                self._live = Live(console=self._console, refresh_per_second=8, transient=True)
                self._live.start()
            self._live.update(self._table(snapshot))
            return
        for line in news:
            self._say("  " + line)

    def changed(self, snapshot: Snapshot) -> None:
        """Say what has changed since the last look, once everything was ready."""
        for line in self._news(snapshot):
            self._say(f"{time.strftime('%H:%M:%S')} {line}")

    def ready(self, state: RunState, phases_s: dict[str, float]) -> None:
        """Print where to send requests."""
        self._end_live()
        total_s = sum(phases_s.values())
        ledger = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in phases_s.items())
        show = self._console.print
        show(f"[bold green]ready[/] in {total_s:.1f} s ({ledger})", highlight=False)
        model = state.models[0]
        token = "  (token: `ray get-auth-token`)" if state.dashboard_token else ""
        rows = [
            ("gRPC", f"{state.grpc}  (penstock.v1.Penstock; reflection on)"),
            ("HTTP", f"{state.http}/v1  (OpenAI API)"),
            ("dashboard", state.dashboard_url + token),
            ("try", f'penstock generate "def " --model {model}'),
        ]
        table = Table.grid(padding=(0, 2))
        for label, text in rows:
            table.add_row(f"  [dim]{label}[/]", text)
        show(table, highlight=False)
        if self._console.is_terminal:
            show("Ctrl-C takes it down.", highlight=False)

    def _news(self, snapshot: Snapshot) -> list[str]:
        """Lines of the replicas that are not as they were, and of those that are gone."""
        now = {record.replica_id: _line(record) for record in snapshot.replicas}
        news = [line for key, line in now.items() if self._shown.get(key) != line]
        gone = [line for key, line in self._shown.items() if key not in now]
        self._shown = now
        return news + [f"{line.partition(': ')[0]}: gone" for line in gone]

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _table(self, snapshot: Snapshot) -> Table:
        table = Table.grid(padding=(0, 2))
        for record in snapshot.replicas:
            table.add_row(
                f"  {record.model}", record.replica_id[:_SHORT_ID], _bar(record), record.detail
            )
        missing = sum(model.replicas for model in self._plan.models) - len(snapshot.replicas)
        if missing > 0:
            table.add_row(f"  [dim]{missing} replica(s) starting[/]", "", "", snapshot.waiting_for)
        return table

    def _end_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def _line(record: ReplicaRecord) -> str:
    """A replica's state in words."""
    line = f"{record.model} {record.replica_id[:_SHORT_ID]}"
    if record.loss is not None and record.state is ReplicaState.READY:
        ranks = ", ".join(map(str, record.loss.ranks))
        return f"{line}: degraded: serves without rank {ranks}. {record.loss.cause}"
    return f"{line}: {record.state}" + (f": {record.detail}" if record.detail else "")


def _bar(record: ReplicaRecord) -> str:
    if record.state is ReplicaState.READY:
        return "[green]" + "━" * _BAR_CELLS + "[/]"
    cells = int(record.progress * _BAR_CELLS)
    return "━" * cells + "[dim]" + "━" * (_BAR_CELLS - cells) + "[/]"
