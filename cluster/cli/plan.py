"""`penstock plan`: the cluster file with every `auto` decided, for this machine."""

from __future__ import annotations

import json
from pathlib import Path

import click

from cluster.base.env import read_environment
from cluster.base.load import load_cluster_file
from cluster.base.plan import to_json
from cluster.cli.console import print_table, print_warning
from cluster.planner.explain import explain, explain_reasons
from cluster.planner.hardware import local_topology
from cluster.planner.hub import Hub
from cluster.planner.plan_file import plan_file


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
@click.option("--explain", "with_reasons", is_flag=True, help="Also show why, and the limits.")
def plan(file: Path, as_json: bool, with_reasons: bool) -> None:
    """Show what would run where, and why.

    Reads FILE, the checkpoints it names and this machine's cores, memory and GPUs; starts nothing.
    """
    environment = read_environment()
    hub = Hub(offline=environment.hub_offline)
    decided = plan_file(load_cluster_file(file), local_topology(environment), hub)
    for warning in decided.warnings:
        print_warning(warning)
    if as_json:
        click.echo(json.dumps(to_json(decided), indent=2))
        return
    for table in explain(decided) + (explain_reasons(decided) if with_reasons else ()):
        print_table(table)
        click.echo()
