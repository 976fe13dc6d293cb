"""`penstock validate`: check a cluster file without touching checkpoints, Ray or the network."""

from __future__ import annotations

from pathlib import Path

import click

from cluster.base.load import load_cluster_file
from cluster.cli.console import console, print_warning
from cluster.planner.front_files import check_front_files


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
def validate(file: Path) -> None:
    """Check a cluster file; starts nothing.

    Reports every problem of FILE with its line. `penstock plan` goes further: it also looks into
    the checkpoints and at this machine. Keys and certificates of the gateway are looked at here.
    """
    loaded = load_cluster_file(file)
    for warning in check_front_files(loaded):
        print_warning(warning)
    num_replicas = sum(model.replicas for model in loaded.spec.models)
    names = ", ".join(model.name for model in loaded.spec.models)
    console.print(
        f"{file}: ok, cluster {loaded.spec.cluster.name}, models {names}, replicas {num_replicas}",
        markup=False,
        soft_wrap=True,
    )
