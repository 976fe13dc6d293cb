"""`penstock status`: replicas, ranks, load and memory blocks of a running cluster."""

from __future__ import annotations

import itertools
import json
from typing import Any

import click
from rich.table import Table

from cluster.base.amount_text import size_text
from cluster.cli.connection_flags import client_of, connection_flags
from cluster.cli.console import console
from cluster.cli.seconds import timeout_option

_SHORT_ID = 8
_COLOURS = {
    "ready": "green",
    "starting": "yellow",
    "draining": "yellow",
    "failed": "red",
    "unreachable": "red",
}


@click.command()
@click.argument("cluster", required=False)
@connection_flags
@click.option("--json", "as_json", is_flag=True, help="Print JSON (proto StatusResponse).")
@timeout_option(10.0, "Seconds to wait for an answer.")
def status(as_json: bool, timeout: float, **flags: Any) -> None:
    """Show what runs: CLUSTER on this machine, or whatever answers at --address."""
    with client_of(flags) as client:
        answer = client.status(deadline_s=timeout)
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    console.print(_models(answer))
    console.print(_replicas(answer))
    for replica in answer["replicas"]:
        if loss := replica.get("loss"):
            console.print(_loss(replica["replica_id"], loss), style="yellow", highlight=False)
    console.print(
        f"gateway pid {answer['gateway_pid']}, {answer['active_requests']} active request(s), "
        f"{answer['resumed_requests']} resumed, dashboard {answer['dashboard_url'] or 'none'}",
        highlight=False,
    )


def _models(answer: dict[str, Any]) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    shares = any(int(model["shared_weight_bytes"]) for model in answer["models"])
    for heading in ("MODEL", "FAMILY", "ENGINE", "READY", "CONTEXT", *(("SHARED",) * shares)):
        table.add_column(heading)
    for model in answer["models"]:
        ready = f"{model['ready_replicas']}/{model['replicas']}"
        colour = "green" if model["ready_replicas"] >= model["replicas"] else "yellow"
        shared = int(model["shared_weight_bytes"])
        row = (model["name"], model["family"], model["engine"], f"[{colour}]{ready}[/]")
        size = (size_text(shared) if shared else "-",) * shares
        table.add_row(*row, str(model["max_context"]), *size)
    return table


def _replicas(answer: dict[str, Any]) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for heading in (
        "REPLICA",
        "MODEL",
        "STATE",
        "RUN",
        "WAIT",
        "KV FREE",
        "LEADER PID",
        "RANK PIDS",
    ):
        table.add_column(heading)
    for replica in answer["replicas"]:
        state, loss = replica["state"], replica.get("loss")
        ranks = _rank_pids(replica["workers"])
        table.add_row(
            replica["replica_id"][:_SHORT_ID],
            replica["model"],
            "[yellow]degraded[/]"
            if loss and state == "ready"
            else f"[{_COLOURS.get(state, 'white')}]{state}[/]",
            str(replica["num_running"]),
            str(replica["num_waiting"]),
            f"{replica['kv_blocks_free']}/{replica['kv_blocks_total']}",
            str(replica["pid"]),
            ranks or replica["detail"],
        )
    return table


def _loss(replica_id: str, loss: dict[str, Any]) -> str:
    """What a replica serves without, and what it has left."""
    lost = ", ".join(
        f"{rank} (node {node})" for rank, node in zip(loss["ranks"], loss["nodes"], strict=True)
    )
    share = loss["num_groups"] / loss["num_groups_whole"]
    return (
        f"{replica_id[:_SHORT_ID]} serves without rank {lost}: {loss['num_groups']} of "
        f"{loss['num_groups_whole']} groups, {share:.0%} of its cache. {loss['cause']}"
    )


def _rank_pids(workers: list[dict[str, Any]]) -> str:
    """Pids in rank order, data-parallel groups apart: `11 12 | 13 14`."""
    groups = itertools.groupby(workers, key=lambda worker: worker["group"])
    return " | ".join(" ".join(str(worker["pid"]) for worker in group) for _, group in groups)
