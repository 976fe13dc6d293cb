"""`penstock apply`: bring a running cluster to what its edited file says."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from cluster.base.errors import ConfigError
from cluster.base.load import load_cluster_file
from cluster.base.plan import ClusterPlan, from_json
from cluster.cli.console import console, print_edit, print_warning
from cluster.cli.seconds import timeout_option
from cluster.cli.up_display import UpDisplay
from cluster.control import run_state
from cluster.control.control_socket import ask
from cluster.control.readiness import Snapshot
from cluster.control.run_state import RunState


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Only show what would change.")
@timeout_option(600.0, "Seconds that new replicas may take to be ready.")
def apply(file: Path, dry_run: bool, timeout: float) -> None:
    """Change the running cluster that FILE names to what FILE says now.

    Replicas, models, limits of the gateway and where a model overflows to can change while
    requests run; new replicas get requests when they are ready, and those that leave finish theirs.
    """
    loaded = load_cluster_file(file)
    state = run_state.only(loaded.spec.cluster.name)
    text = file.read_text(encoding="utf-8-sig")
    apply_text(state, text, path=file, dry_run=dry_run, timeout_s=timeout)


def apply_text(
    state: RunState,
    text: str,
    *,
    path: Path | None = None,
    only: str = "",
    dry_run: bool,
    timeout_s: float,
) -> None:
    """Send a file's text to the process that runs its cluster, and show what that does.

    Args:
        path: what the text's relative paths are relative to; default: the file that runs.
        only: the one change that is meant; any other is refused.

    Raises:
        ConfigError: the cluster is still starting, or the change is refused.
        PenstockError: why the change could not be made.
    """
    if not state.control:
        raise ConfigError(f"{state.name} is still starting.", "Try again when it is ready.")
    question = {
        "path": str((path or Path(state.file)).resolve()),
        "text": text,
        "only": only,
        "dry_run": dry_run,
        "timeout_s": timeout_s,
    }
    started_s = time.monotonic()
    has_changes = _show(state, question)
    if has_changes:
        done = "nothing was changed (--dry-run)" if dry_run else "done"
        console.print(f"{done} in {time.monotonic() - started_s:.1f} s", highlight=False)


def _show(state: RunState, question: dict[str, Any]) -> bool:
    """Show the answer as it comes; whether there is anything to change."""
    answer = ask(state.control, question)
    planned = next(answer)
    print_edit(planned["lines"])
    for warning in planned["warnings"]:
        print_warning(warning)
    with UpDisplay(console, from_json(ClusterPlan, planned["plan"])) as display:
        for line in answer:
            display.progress(from_json(Snapshot, line["snapshot"]))
    return bool(planned["lines"])
