"""`penstock plan`: the cluster file with every `auto` decided, for this machine."""

from __future__ import annotations

import json
from pathlib import Path

import click

from cluster.base.env import read_environment
from cluster.base.errors import ConfigError
from cluster.base.load import load_cluster_file
from cluster.base.plan import ClusterPlan, to_json
from cluster.cli.console import print_table, print_warning
from cluster.cli.frontier_plot import frontier_svg
from cluster.planner.explain import explain, explain_reasons
from cluster.planner.front_files import check_front_files
from cluster.planner.hardware import local_topology
from cluster.planner.hub import Hub
from cluster.planner.plan_file import plan_file


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
@click.option("--explain", "with_reasons", is_flag=True, help="Also show why, and the limits.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    help="Draw batch against speed of the streamed model as an SVG file.",
)
def plan(file: Path, as_json: bool, with_reasons: bool, plot: Path | None) -> None:
    """Show what would run where, and why.

    Reads FILE, the checkpoints it names and this machine's cores, memory and GPUs; starts nothing.
    For models that do not fit, the machine's speeds are measured once.
    """
    environment = read_environment()
    hub = Hub(offline=environment.hub_offline)
    loaded = load_cluster_file(file)
    front_warnings = check_front_files(loaded)
    decided = plan_file(loaded, local_topology(environment), hub)
    for warning in (*front_warnings, *decided.warnings):
        print_warning(warning)
    if plot is not None:
        _draw(decided, plot)
    if as_json:
        click.echo(json.dumps(to_json(decided), indent=2))
        return
    for table in explain(decided) + (explain_reasons(decided) if with_reasons else ()):
        print_table(table)
        click.echo()


def _draw(plan: ClusterPlan, file: Path) -> None:
    """One file for the first streamed model, `NAME-file` for each further one."""
    streamed = [model for model in plan.models if model.speed is not None]
    if not streamed:
        raise ConfigError("No model is streamed; there is nothing to draw.", "Leave --plot out.")
    for index, model in enumerate(streamed):
        target = file if index == 0 else file.with_name(f"{model.name}-{file.name}")
        try:
            target.write_text(frontier_svg(model), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{target} cannot be written: {error.strerror}.") from error
