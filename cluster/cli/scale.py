"""`penstock scale`: another number of replicas, in the running cluster and in its file."""

from __future__ import annotations

from pathlib import Path

import click

from cluster.base.errors import ConfigError
from cluster.base.load import parse_cluster_text
from cluster.base.yaml_edit import set_replicas
from cluster.cli.apply import apply_text
from cluster.cli.console import console
from cluster.cli.seconds import timeout_option
from cluster.control import run_state

_BOM = "\ufeff"


@click.command()
@click.argument("model")
@click.option("--replicas", type=int, required=True, metavar="N", help="How many there shall be.")
@click.option("--cluster", metavar="NAME", help="Which cluster of this machine, if several run.")
@click.option("--dry-run", is_flag=True, help="Only show what would change.")
@timeout_option(600.0, "Seconds that new replicas may take to be ready.")
def scale(model: str, replicas: int, cluster: str | None, dry_run: bool, timeout: float) -> None:
    """Have N replicas of MODEL: what editing `replicas` and `penstock apply` do, in one step.

    When it is done the number stands in the cluster file too; nothing else there changes.
    """
    state = run_state.only(cluster)
    path = Path(state.file)
    try:
        # Line ends as they are: what is not edited stays byte for byte.
        written = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"The file of cluster {state.name}, {path}, cannot be read: {error}.",
            "Restore it, or name another one with `penstock apply FILE`.",
        ) from error
    text = written.removeprefix(_BOM)
    edited = set_replicas(text, path, model, replicas)
    apply_text(state, edited, dry_run=dry_run, timeout_s=timeout, only=f"{model}: replicas")
    if not dry_run and edited != text:
        _write(path, written[: len(written) - len(text)] + edited)
        line = parse_cluster_text(edited, path).line_of(_param(edited, path, model))
        console.print(f"{path}:{line} says replicas: {replicas}", markup=False, soft_wrap=True)


def _param(text: str, path: Path, model: str) -> str:
    names = [entry.name for entry in parse_cluster_text(text, path).spec.models]
    return f"models[{names.index(model)}].replicas"


def _write(path: Path, text: str) -> None:
    """Replace the file in one step; a link stays one."""
    target = path.resolve()
    draft = target.with_name(f".{target.name}.penstock")
    draft.write_bytes(text.encode())
    draft.chmod(target.stat().st_mode)
    draft.replace(target)
