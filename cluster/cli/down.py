"""`penstock down`: end a cluster that runs on this machine."""

from __future__ import annotations

import os
import signal
import time

import click

from cluster.base.errors import UnavailableError
from cluster.cli.console import console
from cluster.cli.seconds import timeout_option
from cluster.control import run_state


@click.command()
@click.argument("cluster", required=False)
@timeout_option(60.0, "Seconds to wait for the end.")
def down(cluster: str | None, timeout: float) -> None:
    """Take CLUSTER down (the only running one if not named) and wait until it is gone."""
    state = run_state.only(cluster)
    console.print(f"stopping {state.name} (pid {state.pid})", highlight=False)
    os.kill(state.pid, signal.SIGTERM)
    deadline_s = time.monotonic() + timeout
    while run_state.process_started(state.pid) == state.pid_started:
        if time.monotonic() > deadline_s:
            raise UnavailableError(
                f"{state.name} (pid {state.pid}) still runs after {timeout:.0f} s.",
                "Its log says what it waits for; `kill -9` is the last resort.",
            )
        time.sleep(0.1)
    console.print(f"{state.name} is down", highlight=False)
